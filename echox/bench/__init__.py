"""Benchmarks of steps and data that `echox bench` runs, on a laptop or on a GPU; they measure, and change nothing."""
