"""Judges and embedders: figures of text that need a model of their own."""
