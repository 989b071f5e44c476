"""What a run will take, before it runs: memory of a GPU, operations, hours, cost. Needs neither data nor OLMo-core."""

from dataclasses import dataclass
from typing import NamedTuple

from gated_attention.engine.run.run_file import Run
from gated_attention.ranges import require_choice
from gated_attention.sizes import FlopsAccount, ModelSize, count_flops, count_parameters
from gated_attention.spec import BlockSpec


class Gpu(NamedTuple):
    """A GPU: its peak in dense bfloat16 operations per second, and its memory in bytes."""

    peak: float
    memory: float


GPUS = {
    "A100": Gpu(312e12, 80e9),
    "H100": Gpu(989e12, 80e9),
    "H200": Gpu(989e12, 141e9),
    "B200": Gpu(2250e12, 192e9),
}
"""By the names that `cost.gpu` takes."""

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: This GPU's share of the float32 weights.
        gradients: Its share of their float32 gradients.
        optimizer: Its share of AdamW's two float32 moments.
        gathered: Weights and gradients of the blocks that are whole while they are computed; on one GPU the weights
            that autocast has cast.
        activations: What one pass keeps for its backward pass; an estimate.
        logits: Of one pass, and their gradient, in float32; an estimate.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float

    @property
    def states(self) -> float:
        """Weights, gradients and moments."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.gathered + self.activations + self.logits


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take.

    Attributes:
        active: Parameters that a token meets.
        flops: Per token.
        gpu_hours: At the MFU that the file states.
    """

    parameters: int
    active: int
    memory: Memory
    tokens_per_step: int
    tokens: int
    flops: FlopsAccount
    gpu: Gpu
    gpus: int
    gpu_hours: float
    dollars: float

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return float(self.flops.total) * self.tokens

    @property
    def fits(self) -> bool:
        """Whether the memory of the GPU suffices, as far as the estimate goes."""
        return self.memory.total <= self.gpu.memory

    @property
    def days(self) -> float:
        """From start to end."""
        return self.gpu_hours / self.gpus / 24


def plan_run(run: Run) -> Plan:
    """The plan of a run.

    Raises:
        ValueError: if `cost.gpu` is unknown.
    """
    cost, gpus = run.file.cost, run.file.parallel.gpus
    require_choice("cost.gpu", cost.gpu, GPUS)
    flops = count_flops(run.size, run.context, run.block)
    tokens = run.steps * run.tokens_per_step
    hours = float(flops.total) * tokens / (GPUS[cost.gpu].peak * cost.mfu) / 3600
    parameters = count_parameters(run.size, run.block)
    idle = 0
    if (num := run.size.num_experts) > 0:
        experts = run.size.num_hidden_layers * 3 * run.size.hidden_size * run.size.intermediate_size
        idle = experts * (num - run.size.num_experts_per_tok)
    return Plan(
        parameters=parameters.total,
        active=parameters.total - idle,
        memory=memory_of(run),
        tokens_per_step=run.tokens_per_step,
        tokens=tokens,
        flops=flops,
        gpu=GPUS[cost.gpu],
        gpus=gpus,
        gpu_hours=hours,
        dollars=hours * cost.dollars_per_gpu_hour,
    )


def memory_of(run: Run) -> Memory:
    """Bytes on each GPU of a run."""
    parallel, precision, size = run.file.parallel, run.file.precision, run.size
    number = _BFLOAT16 if precision.compute == "bfloat16" else _FLOAT32
    parameters = count_parameters(size, run.block)
    share = parameters.total * parallel.replicas / parallel.gpus
    layer = (parameters.attention + parameters.gates + parameters.ffn) / size.num_hidden_layers
    gathered = max(2 * layer, float(size.vocab_size * size.hidden_size)) / parallel.tensor  # one ahead is prefetched
    tokens = run.micro * run.context / (parallel.context * parallel.tensor)  # norms and inputs are shared, too
    kept = _per_layer(size, run.block)
    layers = size.num_hidden_layers
    activations = layers * size.hidden_size + kept if precision.recompute == "full" else layers * kept
    return Memory(
        weights=_FLOAT32 * share,
        gradients=_FLOAT32 * share,
        optimizer=2 * _FLOAT32 * share,
        gathered=2 * number * gathered if parallel.gpus > 1 else parameters.total * (number % _FLOAT32),  # autocast's
        activations=number * tokens * activations,
        logits=(number + 2 * _FLOAT32) * tokens * size.vocab_size,
    )


def _per_layer(size: ModelSize, block: BlockSpec) -> float:
    """Numbers per token that a block keeps for its backward pass."""
    heads, kv = size.num_attention_heads * size.head_dim, size.num_key_value_heads * size.head_dim
    attention = 2 * (heads + 2 * kv) + heads  # before and after norm and rotation; the output
    shapes = [gate.logit_shape(size.geometry) for gate in block.gates]
    gates = sum(rows * channels for rows, channels in shapes) + heads * bool(shapes)
    ffn = 3 * size.intermediate_size * max(size.num_experts_per_tok, 1)
    routed = 2 * size.hidden_size * size.num_experts_per_tok  # each expert's copy of a token, and what it returns
    return 4 * size.hidden_size + attention + gates + ffn + routed


def find_mfu(run: Run, tokens_per_s: float, device: str) -> float | None:
    """Share of the peak of its GPUs that a run reaches, its gates' operations counted; None for an unknown device."""
    gpu = next((gpu for name, gpu in GPUS.items() if name in device), None)
    if gpu is None:
        return None
    flops = count_flops(run.size, run.context, run.block).total
    return tokens_per_s * flops / (gpu.peak * run.file.parallel.gpus)
