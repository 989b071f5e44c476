"""A study as data and as runs: plan, arms, records, comparison."""
