"""Waveforms and what the speech encoder hears of them: decoding, resampling, log-mel; no corpora and no models."""
