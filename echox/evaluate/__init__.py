"""Scores of what a model writes and says: judge, text measures, held-out sets and report; nothing here trains."""
