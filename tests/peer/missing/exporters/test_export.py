"""An empty mixin: the tests of transformers' exporters are not in its sdist."""


class ExportTesterMixin:
    """Nothing to run."""
