"""An adaptation on paper: before and after, beside its controls."""
