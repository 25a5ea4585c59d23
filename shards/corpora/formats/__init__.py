"""Reads how others list recordings: each format becomes lines of a manifest, as if its owner had written one."""
