"""Reports what a run does: events, metrics, progress, hangs and what its steps changed; nothing here trains."""
