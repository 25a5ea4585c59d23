"""What one training step computes: a module a stage, `forward(batch)` returns named losses; no engine, no files."""
