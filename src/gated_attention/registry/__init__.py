"""What a study compares, as data: variants, the paper's numbers, settings. Imports neither torch nor transformers."""
