"""Experiment tracking with MLflow: run creation, batched metrics, a spool for outages; no training code and no Ray."""
