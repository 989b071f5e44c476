"""Documents in, blocks of token ids out."""
