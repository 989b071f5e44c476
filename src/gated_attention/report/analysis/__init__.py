"""An analysis on paper: its page, its data, its figures, its bars in the terminal."""
