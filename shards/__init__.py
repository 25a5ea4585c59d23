"""Corpus recipes: a file or package a corpus turns public data into shards; what they build lies elsewhere."""
