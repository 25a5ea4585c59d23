"""Gives a text LLM a voice: looks at recordings, writes a folder of recipes, and runs all its steps."""
