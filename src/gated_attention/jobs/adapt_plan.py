"""What `adapt` is asked for, checked, and the defaults of what was not said."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gated_attention.jobs.named_model import find_checkpoint, read_config
from gated_attention.ranges import require_choice, require_once, require_within
from gated_attention.registry.choices import ARMS
from gated_attention.registry.variants import gates_of
from gated_attention.spec import GateSpec
from gated_attention.train.adapt import AdaptConfig
from gated_attention.train.text.data import DataConfig
from gated_attention.train.text.tokenizer import load_tokenizer, opens_with_bos

DEFAULT_CONTEXT = 1024
"""Tokens per sequence, if the model has as many positions."""

LEARNING_RATES = {"whole": 5e-5, "lora": 1e-3, "gates": 5e-5}
"""Of everything but gates, by what is trained; where only gates are, the controls train the whole model."""

_HARMLESS = {"log_every", "evaluate_every", "checkpoint_every"}  # change no number

GATE_LEARNING_RATE = 1e-3
"""Of gates."""

RECORDS_NAME = "records"
MODEL_NAME = "model"


@dataclass(frozen=True, slots=True)
class AdaptPlan:
    """What is adapted, how, and what is measured.

    Attributes:
        model: Folder or hub name.
        variant: The variant whose gates are added, neutral at the start.
        layers: As `add_gates`.
        arms: Among `ARMS`.
        data: Its tokenizer is the model's unless another is named.
        output: Folder for `model/`, `records/` and the page.
        num_tokens: Held-out tokens of each measure, about.
        window: Tokens that attention sees without the first; None is a quarter of the context.
        yarn: YaRN's factor in the measure of its cost.
    """

    model: str
    variant: str
    data: DataConfig
    train: AdaptConfig
    output: Path
    layers: tuple[int, ...] | str | None = None
    arms: tuple[str, ...] = ARMS
    seeds: int = 1
    num_tokens: int = 65_536
    window: int | None = None
    yarn: float = 4.0

    def __post_init__(self) -> None:
        _ = self.gates
        for arm in self.arms:
            require_choice("arm", arm, ARMS)
        require_once("arm", self.arms)
        if not self.arms:
            raise ValueError(f"no arm is named; choose from {', '.join(ARMS)}")
        require_within("seeds", self.seeds, least=1, most=10_000)
        require_within("context", self.data.block_size, least=8)
        require_within("tokens", self.num_tokens, least=1, most=2**40)
        require_within("window", self.window, least=1, below=self.data.block_size - 1)
        require_within("yarn", self.yarn, above=1, most=4096)

    @property
    def gates(self) -> tuple[GateSpec, ...]:
        """What is added.

        Raises:
            ValueError: if a gate has no neutral start, or the variant is not gates alone.
        """
        return tuple(gate.neutral() for gate in gates_of(self.variant))

    @property
    def records(self) -> Path:
        """Where the records lie."""
        return self.output / RECORDS_NAME

    def settings(self) -> dict[str, Any]:
        """All that determines the numbers of an arm; which arms and seeds there are does not."""
        return {
            "model": self.model,
            "variant": self.variant,
            "layers": self.layers,
            "data": asdict(self.data),
            "train": {name: value for name, value in asdict(self.train).items() if name not in _HARMLESS},
            "num_tokens": self.num_tokens,
            "window": self.window,
            "yarn": self.yarn,
        }

    def training(self, arm: str) -> AdaptConfig:
        """The settings of an arm: the controls have no gates to train first or alone, and one has no penalties."""
        trained = "whole" if self.train.trained == "gates" else self.train.trained
        if arm == "gated":
            return self.train
        free = replace(self.train, gate_steps=0, trained=trained)
        return free if arm == "penalties" else replace(free, sink_weight=0.0, activation_weight=0.0, fit="ce")

    def model_folder(self, seed: int) -> Path:
        """Where the gated model of a seed is saved."""
        return self.output / (MODEL_NAME if seed == 0 else f"{MODEL_NAME}-seed{seed}")


def make_adapt_plan(
    *,
    model: str,
    output: Path,
    device: torch.device,
    data: Mapping[str, Any],
    train: Mapping[str, Any],
    gate_learning_rate: float | None = None,
    **others: Any,
) -> AdaptPlan:
    """A plan; fields of `data` and `train` that are missing or None take the defaults of model and device.

    Args:
        gate_learning_rate: Absolute; None is `GATE_LEARNING_RATE`.
        others: Of `AdaptPlan`.

    Raises:
        ValueError: if a setting is out of range, a gate cannot start neutral, or there is no such model or tokenizer.
    """
    given_data, given = ({k: v for k, v in values.items() if v is not None} for values in (data, train))
    checkpoint = find_checkpoint(model)
    tokenizer = given_data.setdefault("tokenizer", checkpoint.path)
    if "bos" not in given_data:
        given_data["bos"] = opens_with_bos(load_tokenizer(tokenizer))
    positions = getattr(read_config(checkpoint), "max_position_embeddings", None)
    given_data = {"block_size": min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT), **given_data}
    require_within("gate_learning_rate", gate_learning_rate, least=0, most=1000)
    rate = given.setdefault("learning_rate", LEARNING_RATES.get(given.get("trained", "whole"), 5e-5))
    factor = (GATE_LEARNING_RATE if gate_learning_rate is None else gate_learning_rate) / rate if rate else 1.0
    steps = given.get("steps", 1)
    # 50 points on the loss curve, ten on the validation curve; a resumed run repeats at most a quarter.
    every = {
        name: max(1, steps // parts)
        for name, parts in (("log_every", 50), ("evaluate_every", 10), ("checkpoint_every", 4))
    }
    settings = {"precision": "bfloat16" if device.type == "cuda" else "float32", "gate_learning_rate": factor}
    return AdaptPlan(
        model=model, data=DataConfig(**given_data), train=AdaptConfig(**every | settings | given), output=output,
        **others,
    )  # fmt: skip
