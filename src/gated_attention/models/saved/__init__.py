"""Saved models: their cards, the code that they carry, and loading them whole."""
