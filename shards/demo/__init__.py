"""The demo corpus: spoken questions about countries, their spoken answers, real recordings; no training here."""
