"""The field's spoken-question benchmarks: their public layouts, answers kept item by item, scores, and their page."""
