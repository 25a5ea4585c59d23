"""Waveforms and the speech encoder's input made of them: decoding, resampling, log-mel; no corpora and no models."""
