"""What can be compared, as data: variants, the paper's numbers, settings. Imports neither torch nor transformers."""
