"""Decides which sample comes when, as pure functions of datasets, seed and recipe; reads no sample."""
