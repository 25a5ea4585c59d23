"""The demo: all phases from fetching models to the report, through the same jobs that a user submits."""
