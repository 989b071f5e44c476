"""`python -m gated_attention` is the command `gated-attention`."""

from gated_attention.cli import main

main()
