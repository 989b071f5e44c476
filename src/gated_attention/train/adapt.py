"""Trains a pretrained model with new gates: gates first, then the whole model or LoRA, with penalties on its sink."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.pytorch_utils import Conv1D

from gated_attention.models.families.layers import decoder_layers
from gated_attention.ranges import require_choice, require_within
from gated_attention.train.parameters import gate_names
from gated_attention.train.schedule import rate_factor
from gated_attention.train.sink_losses import SinkLosses
from gated_attention.train.trainer import AuxiliaryTrainer, TrainConfig, train, training_precision

Trained = Literal["whole", "lora", "gates"]
"""What is trained beside the gates: every weight, low-rank additions to the projections, or nothing."""

Fit = Literal["ce", "kl"]
"""What keeps the quality: cross-entropy on the text, or KL divergence from the original model on it."""

_WEIGHTS_NAME = "trained.safetensors"
_GATES = "gates"  # how the names of parameter groups of gates begin


@dataclass(frozen=True, slots=True)
class AdaptConfig(TrainConfig):
    """How to adapt a model.

    Attributes:
        learning_rate: Of everything but gates; `gate_learning_rate` is the factor on it for gates.
        fit: What keeps the quality.
        sink_weight, activation_weight: Factors on the penalties of `SinkLosses`.
        trained: What is trained beside the gates.
        gate_steps: Steps at the beginning that train the gates alone.
        lora_rank: Rank of the additions, whose scale is 2.
    """

    min_learning_rate: float = 0.1
    warmup: float = 0.04
    weight_decay: float = 0.0
    fit: Fit = "ce"
    sink_weight: float = 1.0
    activation_weight: float = 0.05
    trained: Trained = "whole"
    gate_steps: int = 0
    lora_rank: int = 32

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require_choice("loss", self.fit, get_args(Fit))
        require_choice("part to train", self.trained, get_args(Trained))
        for name in ("sink_weight", "activation_weight"):
            require_within(name, getattr(self, name), least=0, most=1e6)
        require_within("lora_rank", self.lora_rank, least=1, most=2**16)
        require_within("gate_steps", self.gate_steps, least=0, below=self.steps)


class GatesFirst(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Freezes all other parameters during the first steps, also of a run that resumes in them."""

    def __init__(self, others: Iterable[nn.Parameter], steps: int) -> None:
        self.others, self.steps = list(others), steps

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Freeze or thaw."""
        for parameter in self.others:
            parameter.requires_grad_(state.global_step >= self.steps)


class AdaptTrainer(AuxiliaryTrainer):
    """Checkpoints hold the trained parameters by name, since the others are the original's; gates may train first."""

    config: AdaptConfig

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """`rate_factor` of every step; the rates of all but the gates begin to rise when these have trained alone."""
        if self.lr_scheduler is None:
            config = self.config
            optimizer = cast(torch.optim.Optimizer, optimizer or self.optimizer)
            starts = [0 if group["name"].startswith(_GATES) else config.gate_steps for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, [partial(_rate, config, start) for start in starts])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {id(one) for group in cast(Any, self.optimizer).param_groups for one in group["params"]}
        tensors = {name: one.detach() for name, one in self.model.named_parameters() if id(one) in trained}
        save_file(tensors, folder / _WEIGHTS_NAME)

    @staticmethod
    def read_weights(model: PreTrainedModel, checkpoint: Path) -> None:
        """Load the trained parameters, all of which the model must have."""
        own = dict(model.named_parameters())
        for name, tensor in load_file(checkpoint / _WEIGHTS_NAME).items():
            own[name].data.copy_(tensor)


def _rate(config: AdaptConfig, start: int, step: int) -> float:
    steps = config.steps - start
    warmup_steps, minimum = max(1, round(config.warmup * steps)), config.min_learning_rate
    return rate_factor(step - start, steps=steps, warmup_steps=warmup_steps, minimum=minimum) if step >= start else 0.0


def adapt_model(
    model: PreTrainedModel,
    config: AdaptConfig,
    *,
    teacher: PreTrainedModel | None = None,
    train_data: Dataset[Any],
    validation_data: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    output: Path,
    seed: int,
    device: torch.device,
    callbacks: Iterable[TrainerCallback] = (),
    say: Callable[[str], None] = lambda message: None,
) -> int:
    """Train in place, from the last sound checkpoint below `output` if there is one; LoRA's additions end up merged.

    Args:
        model: With gates, or without them as a control.
        teacher: The original model, if `config.fit` is `kl`; it takes the model's device and trains nothing.

    Returns:
        Tokens of all training batches.

    Raises:
        ValueError: as in `trainer.train` and `SinkLosses`, or if nothing would be trained or PEFT is not installed.
    """
    gates = set(gate_names(model))
    if config.trained == "gates" and not gates:
        raise ValueError("the model has no gates to train; train the whole model or LoRA")
    torch.manual_seed(seed)  # of LoRA's first matrices
    tuner = _add_lora(model, config.lora_rank, gates) if config.trained == "lora" else None
    others = []
    for name, parameter in model.named_parameters():
        trains = name in gates or config.trained == "whole" or (config.trained == "lora" and "lora_" in name)
        parameter.requires_grad_(trains)
        if trains and name not in gates:
            others.append(parameter)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
    losses = partial(SinkLosses, model, config, teacher, training_precision(device, config))
    first = [GatesFirst(others, config.gate_steps)] if gates and config.gate_steps else []
    num_tokens = train(
        model, config, train_data=train_data, validation_data=validation_data, collate=collate, tokenizer=None,
        output=output, seed=seed, device=device, callbacks=[*first, *callbacks], say=say,
        trainer_class=AdaptTrainer, make_losses=losses,
    )  # fmt: skip
    if tuner is not None:
        tuner.merge_and_unload()
    model.requires_grad_(True)
    return num_tokens


def _add_lora(model: PreTrainedModel, rank: int, gates: set[str]) -> Any:
    """PEFT's tuner, which has put additions beside every linear layer of the decoder but the gates."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ValueError(
            "LoRA needs PEFT, which is not installed; pip install peft, or train the whole model"
        ) from error
    inside = {id(part) for layer in decoder_layers(model) for part in layer.modules()}
    targets = [
        name
        for name, part in model.named_modules()
        if id(part) in inside and isinstance(part, nn.Linear | Conv1D) and f"{name}.weight" not in gates
    ]
    return LoraModel(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), "default")
