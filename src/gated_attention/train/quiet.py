"""Silence for what Hugging Face's libraries log and draw."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import datasets
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as model_logging


@contextmanager
def quiet(level: int = datasets.logging.CRITICAL) -> Iterator[None]:
    """Hide progress bars, and log messages below `level`, of datasets, the hub and transformers; errors still raise."""
    with ExitStack() as restore:
        for logger in (datasets.logging, hub_logging, model_logging):
            restore.callback(logger.set_verbosity, logger.get_verbosity())
            logger.set_verbosity(level)
        if not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if model_logging.is_progress_bar_enabled():
            restore.callback(model_logging.enable_progress_bar)
            model_logging.disable_progress_bar()
        yield
