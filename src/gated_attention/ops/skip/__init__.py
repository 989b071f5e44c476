"""Gated attention that leaves out what closed gates multiply by zero. See docs/skipping.md."""
