"""Writes what other schedulers take: a RayJob or RayCluster for KubeRay, and a batch script for Slurm."""
