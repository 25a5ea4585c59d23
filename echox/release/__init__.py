"""Import and export of models: pinned downloads, foreign formats to ordinary Hugging Face folders; no training here."""
