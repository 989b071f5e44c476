"""Training on transformers' Trainer: settings, counted tokens, resuming from the last sound checkpoint."""

import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from transformers.utils import logging

from gated_attention.models.saved.loading import load_model
from gated_attention.ranges import require_within
from gated_attention.train.auxiliary import AuxiliaryLosses, AuxiliaryWeights
from gated_attention.train.checkpoints import checkpoint_step, find_sound_checkpoint, last_checkpoint, seal, tokens_seen
from gated_attention.train.parameters import parameter_groups
from gated_attention.train.schedule import Passes, rate_factor

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a model is trained: AdamW, linear warm-up, cosine decay.

    Attributes:
        batch_size: Sequences per forward and backward pass.
        accumulation: Passes per optimizer step.
        min_learning_rate: Rate of the last step as a share of `learning_rate`; the paper's is 3e-5 / 2e-3.
        warmup: Share of the steps in which the learning rate rises, the last of them at its peak.
        weight_decay: On the weights that `parameters.decayed_names` names.
        gate_learning_rate: Factor on the learning rate of gate parameters.
        gate_weight_decay: Weight decay of gates' projections; None is `weight_decay`.
        auxiliary: Losses of routers and gates beside the cross-entropy.
        precision: `bfloat16` computes under autocast and keeps float32 weights.
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
    compile: bool = False
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
        if self.weight_decay * self.learning_rate >= 1:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; at this learning rate every step turns the "
                f"weights' signs; it must be below {1 / self.learning_rate:g}"
            )

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of linear warm-up, at least one."""
        return max(1, round(self.warmup * self.steps))

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step sees on one device."""
        return self.batch_size * self.accumulation


class AuxiliaryTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """`transformers.Trainer` with this package's parameter groups, schedule, data order and auxiliary losses.

    The losses that it logs and evaluates stay the cross-entropy alone; the auxiliary ones are logged beside it.
    `state.num_input_tokens_seen` counts the tokens of every batch trained on, over all ranks and resumptions.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    def __init__(self, *args: Any, config: TrainConfig, auxiliary: AuxiliaryLosses, **kwargs: Any) -> None:
        self.config, self.auxiliary = config, auxiliary
        self.expert_counts: torch.Tensor | None = None
        self.cross_entropy: torch.Tensor | None = None
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer | None:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.config), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """`rate_factor` of every step."""
        if self.lr_scheduler is None:
            config = self.config

            def factor(step: int) -> float:
                minimum = config.min_learning_rate
                return rate_factor(step, steps=config.steps, warmup_steps=config.warmup_steps, minimum=minimum)

            self.lr_scheduler = LambdaLR(cast(torch.optim.Optimizer, optimizer or self.optimizer), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Passes:
        sequences = self.config.steps * self.config.sequences_per_step * self.args.world_size
        return Passes(self.train_dataset if train_dataset is None else train_dataset, sequences, self.args.data_seed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """A step's batches; where it has several, experts are counted over all of them before the first is trained."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.expert_counts = None
        if len(batches) > 1 and self.auxiliary.has_routers and self.config.auxiliary.load_balance:
            self.model_wrapped.train()
            self.expert_counts = self.auxiliary.count(self.model_wrapped, map(self._prepare_inputs, batches))
        return batches, num_items

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The cross-entropy, and in training the auxiliary losses with it."""
        if not (self.auxiliary and model.training):
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        with self.auxiliary.gather():
            found = super().compute_loss(model, inputs, return_outputs, **kwargs)
        cross_entropy = found[0] if return_outputs else found
        self.cross_entropy = cross_entropy.detach()
        loss = cross_entropy + self.auxiliary.loss(self.expert_counts, self.current_gradient_accumulation_steps)
        return (loss, found[1]) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward; what is returned, summed and logged is the cross-entropy."""
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size  # ranks' are equal
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss if self.cross_entropy is None else self.cross_entropy

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer's own loads by name, and silently leaves experts, which are saved under other names, at random.
        if self.is_fsdp_enabled:  # with sharded checkpoints of its own, under the model's names
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer writes it, then sealed; what a full disk leaves is removed."""
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
                f"cannot write {place} ({reason}); free space and run again, which goes on from {goes_on}"
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
) -> int:
    """Train in place, from the last sound checkpoint below `output` if there is one.

    Checkpoints are `output/checkpoint-<step>`, readable by `from_pretrained`; the last two are kept, so that a damaged
    one costs the steps since the one before. `find_sound_checkpoint` removes damaged ones, and `say` names them.
    The data order depends on the seed only, so runs of one seed pair, and a resumed run sees what an
    uninterrupted one would.

    Returns:
        Tokens of all batches trained on, counted as they were read, on all ranks and before resumptions too.

    Raises:
        ValueError: as `AuxiliaryLosses` and `check_batch`, or if a checkpoint cannot be written.
    """
    check_batch(train_data, config)  # type: ignore[arg-type]  # every map has a length
    checkpoint = find_sound_checkpoint(output, say)
    tokens_before = tokens_seen(checkpoint) if checkpoint else 0
    if checkpoint and checkpoint_step(checkpoint) >= config.steps:  # the Trainer would take one step more
        load_weights(model, checkpoint)
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
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it waits for the device at every step, and hides divergence
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
    # Where one process sees several GPUs the Trainer would give each a batch of this size, by way of DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    auxiliary = AuxiliaryLosses(model, config.auxiliary)
    trainer = AuxiliaryTrainer(
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
    # Inductor's compile workers fall asleep after an idle minute and may never wake again (pytorch#183884); a
    # process that trains several models would then wait for ever.
    torch._inductor.config.quiesce_async_compile_pool = False
    try:
        with quiet(), reproducible(device):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        auxiliary.remove()
    return int(trainer.state.num_input_tokens_seen)


def check_batch(data: Sized, config: TrainConfig) -> None:
    """Refuse text that does not fill one pass.

    Raises:
        ValueError: if there are fewer sequences than a pass takes.
    """
    if len(data) < config.batch_size:
        raise ValueError(
            f"batch size {config.batch_size} exceeds the training text, which fills {len(data)} sequences; "
            f"use a --batch-size of at most {max(1, len(data))}, a smaller --context or more text"
        )


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Read a checkpoint's weights into a model, by way of `from_pretrained`, which knows how experts are stored.

    Raises:
        ValueError: if the checkpoint is not whole.
    """
    with quiet():
        saved = load_model(type(model), checkpoint, dtype="auto")
    model.load_state_dict(saved.state_dict())


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On a CPU, bitwise: several threads add up the gradients of experts' inputs in any order unless told not to.

    On a GPU this would cost speed, and attention's backward pass would still not be.
    """
    before, only_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings, e.g. of the tied head that a checkpoint does not repeat; errors are raised."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars(), warnings.catch_warnings():
            # Its version checks, which the compiler may well evaluate once.
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the bars that transformers draws while it loads weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
