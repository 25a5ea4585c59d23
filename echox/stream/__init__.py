"""Everything between a tar shard and a tensor: index, order, reading, batches; no models and no training."""
