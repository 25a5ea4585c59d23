"""Makes unit HiFi-GANs: imports published ones and trains them on shards; how they speak is in `echox/speak/`."""
