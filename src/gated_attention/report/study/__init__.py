"""A study on paper: its page, its table, its figures, its progress in the terminal."""
