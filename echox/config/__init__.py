"""Recipes and DeepSpeed JSON: schema, reading, overrides, sentences about mistakes; nothing here runs a model."""
