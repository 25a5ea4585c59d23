"""The networks as plain `nn.Module`s: shapes and arithmetic only; no files, no engine, no losses."""
