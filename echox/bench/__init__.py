"""Step, data and teacher benchmarks: what `echox bench` runs, on a laptop or on a GPU."""
