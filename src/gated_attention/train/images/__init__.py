"""Labelled images: read, held out, and drawn as a model is trained on them."""
