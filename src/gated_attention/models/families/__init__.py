"""Gates for any transformers model: how its attention is laid out, `add_gates`, and classes that save and load."""
