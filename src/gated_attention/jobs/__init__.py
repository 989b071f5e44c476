"""Commands on existing models: analysis and evaluation."""
