"""Speech to discrete units, and unit language; no shards, no training of networks, no waveform out."""
