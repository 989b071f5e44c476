"""What the test classes of transformers import and its sdist leaves out."""
