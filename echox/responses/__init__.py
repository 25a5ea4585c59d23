"""The LLM's own answers to the questions of a dataset: decoding them, keeping them, and looking them up in training."""
