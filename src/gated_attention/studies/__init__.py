"""Which models are compared, how a comparison runs and resumes, and what its report says."""
