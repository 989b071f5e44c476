"""The learning rate of every step, and the order of sequences through a whole run."""

from collections.abc import Iterator, Sized
from math import cos, pi

import torch
from torch.utils.data import Sampler


def rate_factor(step: int, *, steps: int, warmup_steps: int, minimum: float) -> float:
    """The learning rate in a step, counted from 0, as a share of the peak.

    It rises linearly to 1 in step `warmup_steps - 1` and falls as a cosine to `minimum` in step `steps - 1`. No step
    has a rate of 0, except the last one if `minimum` is 0.
    """
    done = step + 1
    if done <= warmup_steps:
        return done / warmup_steps
    progress = min(1.0, (done - warmup_steps) / max(1, steps - warmup_steps))  # PyTorch asks for one step more
    return minimum + (1 - minimum) * (1 + cos(pi * progress)) / 2


class Passes(Sampler[int]):
    """Indices of a whole run: passes over all sequences, each in a new order, until `num_samples` are drawn.

    The loader iterates over this once per run, so no step is cut short where the text restarts. The order depends on
    the seed alone. Data that varies with the pass, as augmented images do, gets numbers that go on from pass to pass.
    """

    def __init__(self, data: Sized, num_samples: int, seed: int) -> None:
        self.data, self.num_samples, self.seed = data, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left, first = self.num_samples, 0
        while left > 0:
            order = (first + torch.randperm(len(self.data), generator=generator)).tolist()[:left]
            yield from order
            left -= len(order)
            first += len(self.data) * getattr(self.data, "varies", False)
