"""Benchmarks that `echox bench` runs on a laptop or a cluster node; they measure, and change nothing."""
