"""Serves a trained run over HTTP: answers as they come, and a page to speak to. It trains and scores nothing."""
