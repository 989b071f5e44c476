"""Reading a model without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Without gradients and dropout; every module's mode is restored. Yields the device for what the model reads.

    That is the device of its first weight that is in memory; what offloads the others moves its inputs by itself.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
    finally:
        for module, training in modes.items():
            module.training = training
