"""The sections of a run's file; what is None follows from the size, the data or the device."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config

_Count = Annotated[int, Field(ge=1)]
_Degree = Annotated[int, Field(ge=1, le=1_000_000)]
_section = with_config(ConfigDict(extra="forbid"))


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model: a size and a variant of the registry, or fields of either in their place.

    Attributes:
        size: A size of the registry, whose fields the ones below replace; without it they are all needed.
        variant: A variant of the registry; `custom` where `gates` or another field of the block is given.
        match_parameters: Whether a variant narrows the FFN of a dense size, as in a study.
        ffn_multiple: Narrowed FFN widths are rounded to this multiple.
        vocab_size: That of the data if None; a larger one leaves rows unused.
        gates: Fields of `GateSpec`, a mapping for each gate.
        switch: Fields of `SwitchSpec`.
        start: A folder that a gated Qwen3 was saved to, whose weights the run begins with.
    """

    size: str | None = None
    variant: str | None = None
    match_parameters: bool = True
    num_hidden_layers: _Count | None = None
    hidden_size: _Count | None = None
    num_attention_heads: _Count | None = None
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    intermediate_size: _Count | None = None
    vocab_size: _Count | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: float | None = None
    ffn_multiple: _Count | None = None
    gates: tuple[dict[str, Any], ...] | None = None
    switch: dict[str, Any] | None = None
    sdpa_transform: Literal["rms_norm", "silu"] | None = None
    sandwich_norm: bool | None = None
    output_clip: float | None = None
    start: str | None = None


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is read: text, as `compare` reads it, or folders of token shards that `tokenize` wrote.

    Attributes:
        text: A file, a folder, a hub name, or `stdlib`.
        paths: Folders of token shards, in place of `text`.
        validation: Held-out text or, with `paths`, a folder of shards; None holds out part of `text`.
        packing: `documents` keeps documents of a sequence apart.
    """

    text: str | None = None
    paths: tuple[str, ...] = ()
    validation: str | None = None
    text_field: str = "text"
    tokenizer: str | None = None
    context: Annotated[int, Field(ge=2, le=2**30)] | None = None
    bos: bool = False
    packing: Literal["stream", "documents"] = "stream"


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW.

    Attributes:
        learning_rate: The peak; a variant may train with a multiple of it.
        skip_steps: How many steps in a row may be skipped because a gradient is not finite; 0 skips none.
    """

    learning_rate: float | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    skip_steps: Annotated[int, Field(ge=0)] = 3


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Auxiliary:
    """Factors on the losses of routers, as in `AuxiliaryWeights`; a dense model has none."""

    load_balance: float | None = None
    router_z: float | None = None


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine.

    Attributes:
        tokens: Training tokens, in place of `steps`.
        warmup: Share of the steps in which the rate rises.
        min_learning_rate: Rate of the last step as a share of the peak.
    """

    steps: _Count | None = None
    tokens: float | None = None
    warmup: float | None = None
    min_learning_rate: float = 0.015


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """How many sequences an optimizer step reads.

    Attributes:
        sequences: Over all GPUs.
        micro: Per GPU and pass, at most; the rest are further passes of the step.
    """

    sequences: _Count | None = None
    micro: _Count | None = None


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How GPUs share the work.

    Attributes:
        gpus: All of them; under torchrun, its number of processes.
        replicas: Copies of the weights: 1 is FSDP, more are HSDP, each sharded over the GPUs of a replica.
        tensor: GPUs that share every matrix.
        context: GPUs that share every sequence.
    """

    gpus: _Degree = 1
    replicas: _Degree = 1
    tensor: _Degree = 1
    context: _Degree = 1


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How numbers are computed; weights and optimizer states are float32.

    Attributes:
        compute: Of matrices and activations.
        compile: `torch.compile` of every block.
        recompute: `full` keeps only the input of each block for the backward pass.
    """

    compute: Literal["float32", "bfloat16"] | None = None
    compile: bool | None = None
    recompute: Literal["none", "full"] = "none"


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Which checkpoints are written and kept.

    Attributes:
        every: In steps; the last step has one, too.
        keep: The newest that stay.
        export: Whether a finished run writes its model as a folder that `from_pretrained` loads.
    """

    every: _Count | None = None
    keep: _Count = 2
    export: bool = True


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out loss and what is logged.

    Attributes:
        every: Steps between held-out losses; the last step has one, too.
        tokens: About how many held-out tokens.
        probe_every: Steps between lines of `probe.jsonl`, measured on the held-out tokens; 0 for none.
        log_every: Steps between lines of `metrics.jsonl`.
    """

    every: _Count | None = None
    tokens: _Count | None = None
    probe_every: Annotated[int, Field(ge=0)] | None = None
    log_every: _Count | None = None


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What `--plan` reckons with.

    Attributes:
        gpu: Its name in `plan.GPUS`.
        mfu: Share of its peak that training reaches.
        dollars_per_gpu_hour: Its price.
    """

    gpu: str = "H100"
    mfu: float = 0.4
    dollars_per_gpu_hour: float = 2.5


@_section
@dataclass(frozen=True, slots=True, kw_only=True)
class Sections:
    """A whole file."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    schedule: Schedule = field(default_factory=Schedule)
    batch: Batch = field(default_factory=Batch)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    evaluation: Evaluation = field(default_factory=Evaluation)
    cost: Cost = field(default_factory=Cost)
