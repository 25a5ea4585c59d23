"""Trains one recipe with many settings, as jobs of a cluster, and compares them."""
