"""The dataset on disk: tar headers, samples, index, catalogue, and their writers; fetching and order are elsewhere."""
