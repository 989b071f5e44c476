"""What a study will take, before it runs: tokens, parameters, and minutes by the speed of its device."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch

from gated_attention.device import device_name
from gated_attention.models.build import count_of
from gated_attention.registry.settings import SUSTAINED
from gated_attention.sizes import ModelSize, count_flops
from gated_attention.study.arms import StudyPlan
from gated_attention.study.record import Result
from gated_attention.train.images.data import ImageConfig

_PER_THREAD = 2e10
"""FLOP/s of a CPU thread, size `tiny`."""

_STEP_S = 0.012
"""What a step takes on a GPU at least, however small the model."""

_AROUND_S = {"cuda": 40.0, "cpu": 8.0}
"""Seconds of an arm outside of its steps: building, compiling, measuring."""


class Expected(NamedTuple):
    """What one point of a study will take.

    Attributes:
        parameters: Of the first variant.
        minutes: Of one device, over all arms of the point.
    """

    point: str
    num_arms: int
    steps: int
    tokens_per_step: int
    parameters: int
    minutes: float

    @property
    def tokens(self) -> int:
        """Training tokens of each arm."""
        return self.steps * self.tokens_per_step


def expect(plan: StudyPlan, device: torch.device, speed: float) -> Expected:
    """What the arms of a plan will take at a speed in FLOP/s."""
    size = replace(plan.size, vocab_size=_vocabulary(plan))
    per_step = plan.train.sequences_per_step * plan.data.block_size
    step_s = count_flops(size, plan.data.block_size).total * per_step / speed
    arm_s = plan.train.steps * max(step_s, _STEP_S * (device.type == "cuda")) + _AROUND_S[device.type]
    num_arms = len(plan.variants) * plan.seeds
    matrices = size.hidden_size * (1 if size.tie_word_embeddings else 2)
    more = (size.vocab_size - plan.size.vocab_size) * matrices  # than the size's own vocabulary
    parameters = count_of(plan.arms[0].model_config()).total + more
    return Expected(plan.point, num_arms, plan.train.steps, per_step, parameters, num_arms * arm_s / 60)


def find_speed(device: torch.device, finished: Sequence[Result]) -> tuple[float, str]:
    """FLOP/s of training on a device, and where the number comes from: arms that are finished, or a table."""
    name = device_name(device)
    if speeds := [speed for result in finished if result.device == name and (speed := _measured(result))]:
        return median(speeds), f"{len(speeds)} finished arm{'s' * (len(speeds) > 1)} on {name}"
    if device.type == "cpu":
        return _PER_THREAD * torch.get_num_threads(), f"a rough guess for {name}"
    known = next((key for key in SUSTAINED if key in name), None)
    return known_speed(known) if known else (SUSTAINED["A100"], f"an A100, for want of a {name}")


def known_speed(gpu: str) -> tuple[float, str]:
    """FLOP/s of training on a GPU of `SUSTAINED`, and where the number comes from."""
    return SUSTAINED[gpu], f"other studies on an {gpu}"


def _measured(result: Result) -> float | None:
    """FLOP/s that a finished arm reached."""
    measure = result.measures.get("train_tokens_per_s")
    size, context = result.config.get("size"), result.config.get("data", {}).get("block_size")
    if measure is None or not isinstance(size, Mapping) or context is None:
        return None
    vocabulary = result.config.get("model", {}).get("vocab_size", size["vocab_size"])
    return measure.value * count_flops(replace(ModelSize(**size), vocab_size=vocabulary), context).total


def _vocabulary(plan: StudyPlan) -> int:
    """The vocabulary that a tokenizer's name tells, or the size's."""
    if isinstance(plan.data, ImageConfig):
        return plan.size.vocab_size
    name = plan.data.tokenizer
    if name == "bytes":
        return 257
    number = name.removeprefix("bpe-")
    return int(number) if number.isdecimal() else plan.size.vocab_size
