"""An empty mixin: the tests of generation are not in transformers' sdist."""


class GenerationTesterMixin:
    """Nothing to run."""
