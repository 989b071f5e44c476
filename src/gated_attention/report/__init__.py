"""Pages, tables and figures, made of records alone."""
