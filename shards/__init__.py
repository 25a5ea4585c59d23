"""Corpus recipes: one package or file a corpus that turns public data into shards; built shards live in the cache."""
