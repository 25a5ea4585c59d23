"""Ablations: train, score and compare variants of Stage III at a small scale; what a variant does is not here."""
