"""Experiment tracking with MLflow: run creation, batched metrics, a spool for bad days; no training code and no Ray."""
