"""Training with transformers' Trainer: settings, counted tokens, resuming from the last sound checkpoint."""

import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch._inductor.config
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from gated_attention.ranges import require_within
from gated_attention.registry.penalty import AuxiliaryWeights
from gated_attention.train.auxiliary import AuxiliaryLosses
from gated_attention.train.checkpoints import (
    checkpoint_step,
    find_sound_checkpoint,
    last_checkpoint,
    load_weights,
    seal,
    tokens_seen,
)
from gated_attention.train.images.data import Images
from gated_attention.train.optimizer import Optimizer, make_optimizer
from gated_attention.train.quiet import quiet
from gated_attention.train.schedule import Passes, rate_factor

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train a model: AdamW or Muon, linear warm-up, cosine decay.

    Attributes:
        batch_size: Sequences per forward and backward pass.
        accumulation: Passes per optimizer step.
        min_learning_rate: Rate of the last step as a share of `learning_rate`; the paper's is 3e-5 / 2e-3.
        warmup: Share of the steps in which the learning rate rises; the last of them is at the peak.
        weight_decay: Applies to the weights in `parameters.decayed_names`.
        gate_learning_rate: Factor on the learning rate of gate parameters.
        gate_weight_decay: Weight decay of gate projections; None means `weight_decay`.
        auxiliary: Losses of routers and gates beside the cross-entropy.
        precision: `bfloat16` computes under autocast and keeps float32 weights.
        optimizer: `muon` is Muon on the matrices between the embedding and the head, and AdamW on the rest.
        residual: `bfloat16` rounds the residual stream before every layer.
        cuda_graphs: Whether compiled code is replayed as CUDA graphs, which spares a small model the launches of its
            kernels. Gradients then lie in memory that the next pass reuses, so that a step is one pass.
        log_every, evaluate_every, checkpoint_every: In optimizer steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulation: int = 1
    min_learning_rate: float = 0.015
    warmup: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    gate_learning_rate: float = 1.0
    gate_weight_decay: float | None = None
    auxiliary: AuxiliaryWeights = field(default_factory=AuxiliaryWeights)
    precision: Precision = "float32"
    optimizer: Optimizer = "adamw"
    residual: Precision = "float32"
    compile: bool = False
    cuda_graphs: bool = False
    log_every: int = 10
    evaluate_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "evaluate_every", "checkpoint_every"):
            require_within(name, getattr(self, name), least=1, most=10**9)
        require_within("learning_rate", self.learning_rate, above=0, most=1000)
        for name in ("weight_decay", "gate_weight_decay", "gate_learning_rate", "max_grad_norm"):
            require_within(name, getattr(self, name), least=0)
        for name in ("beta1", "beta2"):
            require_within(name, getattr(self, name), least=0, below=1)
        for name in ("min_learning_rate", "warmup"):
            require_within(name, getattr(self, name), least=0, most=1)
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs replays compiled code; leave compile on, or cuda_graphs out")
        if self.cuda_graphs and self.accumulation > 1:
            raise ValueError(f"accumulation is {self.accumulation}; with cuda_graphs a step is one pass, use 1")
        if self.weight_decay * self.learning_rate >= 1:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; at this learning rate every step flips the "
                f"signs of weights; it must be below {1 / self.learning_rate:g}"
            )

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of linear warm-up, at least one."""
        return max(1, round(self.warmup * self.steps))

    @property
    def sequences_per_step(self) -> int:
        """Sequences per optimizer step on one device."""
        return self.batch_size * self.accumulation


class AuxiliaryTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """`transformers.Trainer` with this package's parameter groups, schedule, data order and auxiliary losses.

    The logged and evaluated loss is the cross-entropy alone; auxiliary losses are logged beside it.
    `state.num_input_tokens_seen` counts the tokens of every training batch, over all ranks and resumptions.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    def __init__(self, *args: Any, config: TrainConfig, auxiliary: AuxiliaryLosses, **kwargs: Any) -> None:
        self.config, self.auxiliary = config, auxiliary
        self.expert_counts: torch.Tensor | None = None
        self.cross_entropy: torch.Tensor | None = None
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer | None:
        """AdamW over `parameter_groups`, with Muon if the settings say so."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = make_optimizer(model, self.config, optimizer_class, options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """`rate_factor` of every step."""
        if self.lr_scheduler is None:
            config = self.config
            minimum = config.min_learning_rate
            factor = partial(rate_factor, steps=config.steps, warmup_steps=config.warmup_steps, minimum=minimum)
            self.lr_scheduler = LambdaLR(cast(torch.optim.Optimizer, optimizer or self.optimizer), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Passes:
        sequences = self.config.steps * self.config.sequences_per_step * self.args.world_size
        return Passes(self.train_dataset if train_dataset is None else train_dataset, sequences, self.args.data_seed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """The batches of a step; if there are several, experts are first counted over all of them."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.expert_counts = None
        if len(batches) > 1 and self.auxiliary.has_routers and self.config.auxiliary.load_balance:
            self.model_wrapped.train()
            self.expert_counts = self.auxiliary.count(self.model_wrapped, map(self._prepare_inputs, batches))
        return batches, num_items

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The cross-entropy, plus the auxiliary losses in training."""
        if not (self.auxiliary and model.training):
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        with self.auxiliary.gather():
            found = super().compute_loss(model, inputs, return_outputs, **kwargs)
        cross_entropy = found[0] if return_outputs else found
        self.cross_entropy = cross_entropy.detach()
        passes = self.current_gradient_accumulation_steps
        loss = self.auxiliary.total(cross_entropy, self.expert_counts, passes)
        return (loss, found[1]) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward; returns the cross-entropy, which the Trainer sums and logs."""
        self.state.num_input_tokens_seen += self._num_tokens(inputs) * self.args.world_size  # equal on all ranks
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss if self.cross_entropy is None else self.cross_entropy

    def _num_tokens(self, inputs: dict[str, Any]) -> int:
        """Tokens of a batch; of images, their patches."""
        if "input_ids" in inputs:
            return int(inputs["input_ids"].numel())
        pixels = inputs["pixel_values"]
        patch: int = cast(Any, self.model).config.patch_size
        return int(pixels[:, 0].numel()) // patch**2

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer loads by name, and silently leaves experts, which are saved under other names, at random.
        if self.is_fsdp_enabled:  # its sharded checkpoints use the model's names
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.read_weights(self.model, Path(resume_from_checkpoint))

    @staticmethod
    def read_weights(model: PreTrainedModel, checkpoint: Path) -> None:
        """Load what `_save` wrote."""
        load_weights(model, checkpoint)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint as the Trainer does, then seal it; what a full disk leaves is removed."""
        place = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(*args, **kwargs)
            if self.args.world_size == 1:
                seal(place)
        except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch's own writer raises RuntimeError
            shutil.rmtree(place, ignore_errors=True)
            before = last_checkpoint(Path(self.args.output_dir))
            goes_on = f"step {checkpoint_step(before)}" if before else "the beginning"
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"cannot write {place} ({reason}); free space and run again, which continues from {goes_on}"
            ) from error

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log; training lines carry the auxiliary losses since the last one."""
        super().log({**logs, **self.auxiliary.read()} if "loss" in logs else logs, start_time)


def train(
    model: PreTrainedModel,
    config: TrainConfig,
    *,
    train_data: Dataset[Any],
    validation_data: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    output: Path,
    seed: int,
    device: torch.device,
    callbacks: Iterable[TrainerCallback] = (),
    say: Callable[[str], None] = lambda message: None,
    trainer_class: type[AuxiliaryTrainer] = AuxiliaryTrainer,
    make_losses: Callable[[], AuxiliaryLosses] | None = None,
) -> int:
    """Train in place, from the last sound checkpoint below `output` if there is one.

    Checkpoints are `output/checkpoint-<step>`, readable by `from_pretrained`. The last two are kept, so that a damaged
    one costs only the steps since the one before. `find_sound_checkpoint` removes damaged ones, and `say` names them.
    The data order depends on the seed alone, so runs with equal seeds are paired, and a resumed run sees what an
    uninterrupted one would.

    Args:
        make_losses: Puts the hooks of other losses than those in `config.auxiliary` on the model.

    Returns:
        Tokens of all training batches, counted as they were read, over all ranks and resumptions.

    Raises:
        ValueError: as in `AuxiliaryLosses` and `check_batch`, or if a checkpoint cannot be written.
    """
    check_batch(train_data, config)  # type: ignore[arg-type]  # every map has a length
    checkpoint = find_sound_checkpoint(output, say)
    tokens_before = tokens_seen(checkpoint) if checkpoint else 0
    if checkpoint and checkpoint_step(checkpoint) >= config.steps:  # the Trainer would take one more step
        trainer_class.read_weights(model, checkpoint)
        model.to(device)
        return tokens_before
    arguments = Arguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=config.precision == "bfloat16",
        torch_compile=config.compile,
        torch_compile_mode="reduce-overhead" if config.cuda_graphs else None,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it synchronises with the device at every step, and hides divergence
        eval_strategy="steps",
        eval_steps=config.evaluate_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    # Where one process sees several GPUs, the Trainer would use DataParallel with a batch of this size on each.
    arguments._n_gpu = min(1, arguments.n_gpu)
    auxiliary = make_losses() if make_losses else AuxiliaryLosses(model, config.auxiliary)
    trainer = trainer_class(
        model=model,
        args=arguments,
        config=config,
        auxiliary=auxiliary,
        train_dataset=train_data,
        eval_dataset=validation_data,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    # Inductor's compile workers sleep after an idle minute and may never wake again (pytorch#183884); a process that
    # trains several models would then wait forever.
    torch._inductor.config.quiesce_async_compile_pool = False
    try:
        with quiet(logging.ERROR), warnings.catch_warnings(), reproducible(device):
            # A version check of transformers, which the compiler may evaluate once.
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        auxiliary.remove()
    return int(trainer.state.num_input_tokens_seen)


def check_batch(data: Sized, config: TrainConfig) -> None:
    """Refuse text with fewer sequences, or images fewer, than one pass takes."""
    if len(data) < config.batch_size and isinstance(data, Images):
        raise ValueError(f"batch size {config.batch_size} exceeds the {len(data)} training images; use at most that")
    if len(data) < config.batch_size:
        raise ValueError(
            f"batch size {config.batch_size} exceeds the training text, which fills {len(data)} sequences; "
            f"use a --batch-size of at most {max(1, len(data))}, a smaller --context or more text"
        )


def training_precision(device: torch.device, settings: TrainConfig) -> torch.autocast:
    """A context in which a model computes as it did in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Make a CPU run deterministic to the bit: otherwise threads sum the gradients of experts' inputs in any order.

    On a GPU this would cost speed, and the backward pass of attention would still not be deterministic.
    """
    before = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
