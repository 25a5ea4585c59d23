"""Writes, verifies, lists and reads checkpoints; what a run does with one is decided by the loop, not here."""
