"""A study: plan, arms, runs, records, comparison."""
