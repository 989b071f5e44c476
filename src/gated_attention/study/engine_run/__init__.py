"""One run on the engine: its text made tokens, trained, and recorded as an arm of a study is."""
