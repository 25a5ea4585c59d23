"""Serves a trained run on a Ray cluster: Ray Serve's replicas of the application of `echox/serve`."""
