"""The layouts of recordings and public corpora: how each is read; building shards of them is in `shards.builder`."""
