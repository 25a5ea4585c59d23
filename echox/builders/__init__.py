"""Builds a stage and its loaders from a recipe: the one place where models, data and engine meet.

No layer is defined here, and no step is computed.
"""
