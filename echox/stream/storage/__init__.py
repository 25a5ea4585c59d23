"""Brings verified bytes of a sample from a folder, a server or an object store; knows nothing of order or batches."""
