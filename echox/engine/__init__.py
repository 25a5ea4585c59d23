"""The training engine: DeepSpeed, train loop, checkpoints, run contexts; no model, no reading of data, no Ray."""
