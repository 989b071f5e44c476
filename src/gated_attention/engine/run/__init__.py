"""A run on the engine as one file: read, planned, trained. Only `train` and `callbacks` need OLMo-core."""
