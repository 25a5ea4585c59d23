"""Everything Ray: the job's entry point, submission, the local head, the demo and the recipes; no model and no loss."""
