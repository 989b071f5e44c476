"""An evaluation on paper: its data, its figures, its table in the terminal."""
