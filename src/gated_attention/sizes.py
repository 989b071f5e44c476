"""Model sizes as data, their parameter counts, and FFN widths that keep a count equal.

Imports neither torch nor transformers; a test builds every size and counts.
"""

from dataclasses import asdict, dataclass, replace

from gated_attention.ranges import require_choice
from gated_attention.spec import AttentionGeometry, BlockSpec

_PLAIN = BlockSpec()


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A decoder, dense or mixture-of-experts; Qwen3-shaped unless an architecture has fitted it to itself.

    Attributes:
        intermediate_size: Width of the FFN, or of each expert.
        num_experts: Experts per layer, of which each token uses `num_experts_per_tok`; 0 is a dense model.
        ffn_multiple: Narrowed FFN widths are rounded to this multiple.
        ffn_matrices: Matrices of the FFN: 3 with a gate of its own, 2 without.
        context: Tokens per training sequence.
        cites: Where the shape is published; empty for our own small sizes.
    """

    name: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    tie_word_embeddings: bool = True
    rope_theta: float = 10_000.0
    ffn_multiple: int = 128
    ffn_matrices: int = 3
    cites: str = ""

    @property
    def geometry(self) -> AttentionGeometry:
        """The attention widths that determine gate shapes."""
        return AttentionGeometry(self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim)


# In our own sizes num_attention_heads * head_dim is a multiple of 3: an elementwise sdpa gate then costs exactly a
# third of that in FFN channels, and matching leaves no residue.
SIZES: dict[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize("tiny", 4, 128, 6, 3, 32, 384, 257, 256, ffn_multiple=1),
        ModelSize("xs", 24, 256, 6, 3, 64, 768, 16_384, 512, ffn_multiple=2),
        ModelSize("s", 12, 512, 6, 3, 128, 1536, 16_384, 1024, ffn_multiple=4),
        ModelSize("m", 12, 768, 6, 3, 128, 2304, 16_384, 1024, ffn_multiple=4),
        ModelSize("moe-tiny", 4, 128, 6, 3, 32, 48, 257, 256, 16, 4, False, ffn_multiple=2),
        ModelSize("moe-xs", 12, 256, 6, 3, 64, 96, 16_384, 512, 32, 4, False, ffn_multiple=2),
        ModelSize("moe-s", 12, 512, 6, 3, 128, 192, 16_384, 1024, 64, 8, False, ffn_multiple=8),
        ModelSize("1.7b-28l", 28, 2048, 16, 8, 128, 6144, 152_064, 4096, cites="T7"),
        ModelSize("1.7b-48l", 48, 1536, 16, 8, 128, 4608, 152_064, 4096, cites="T7"),
        ModelSize("15a2b", 24, 2048, 32, 4, 128, 768, 151_936, 4096, 128, 8, False, cites="T7"),
    )
}
"""Table 7's models and small ones for experiments, dense and mixture-of-experts."""


def get_size(name: str) -> ModelSize:
    """The size of that name.

    Raises:
        ValueError: if there is none.
    """
    require_choice("size", name, SIZES)
    return SIZES[name]


@dataclass(frozen=True, slots=True)
class ParameterAccount:
    """Parameter counts of a whole model by component."""

    embeddings: int
    attention: int
    gates: int
    ffn: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters, tied embeddings counted once."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Every count and the total."""
        return {**asdict(self), "total": self.total}


def count_parameters(size: ModelSize, block: BlockSpec = _PLAIN) -> ParameterAccount:
    """The parameters of a Qwen3 of this size with this block in every layer.

    Of another architecture's size it leaves out biases and learned positions; `models.build` counts any model.
    """
    geometry, layers, hidden = size.geometry, size.num_hidden_layers, size.hidden_size
    heads_width = (2 * size.num_attention_heads + 2 * size.num_key_value_heads) * size.head_dim
    switch = 0 if block.switch is None else block.switch.num_parameters(geometry)
    ffn_width, router = size.intermediate_size * max(size.num_experts, 1), hidden * size.num_experts
    return ParameterAccount(
        embeddings=size.vocab_size * hidden * (1 if size.tie_word_embeddings else 2),
        attention=layers * (hidden * heads_width + switch),
        gates=layers * sum(gate.num_parameters(geometry) for gate in block.gates),
        ffn=layers * (size.ffn_matrices * hidden * ffn_width + router),
        norms=layers * (2 * hidden + 2 * size.head_dim + block.num_norm_parameters(geometry)) + hidden,
    )


@dataclass(frozen=True, slots=True)
class FlopsAccount:
    """Floating-point operations of training per token, forward and backward, by component.

    Attributes:
        weights: Six for each weight that a token meets: the head, attention, the FFN or the experts it is sent to.
        gates: The same for gates.
        attention: Scores and weighted values, of which a causal mask leaves half.
    """

    weights: int
    gates: int
    attention: int

    @property
    def total(self) -> int:
        """All of them; norms, activations and what recomputation repeats are not counted."""
        return self.weights + self.gates + self.attention


def count_flops(size: ModelSize, context: int, block: BlockSpec = _PLAIN) -> FlopsAccount:
    """What training takes per token of sequences of `context` tokens."""
    counts = count_parameters(size, block)
    met = counts.ffn
    if size.num_experts:
        router = size.num_hidden_layers * size.hidden_size * size.num_experts
        met = router + (counts.ffn - router) * size.num_experts_per_tok // size.num_experts
    return FlopsAccount(
        weights=6 * (size.vocab_size * size.hidden_size + counts.attention + met),
        gates=6 * counts.gates,
        attention=6 * size.num_hidden_layers * size.num_attention_heads * size.head_dim * context,
    )


def match_parameters(size: ModelSize, block: BlockSpec) -> ModelSize:
    """The size with its FFN, or its experts, narrowed so that the block adds no parameters.

    The width is rounded to the nearest `ffn_multiple`, as in the paper's release (6144 becomes 5504 for the
    elementwise gate of 1.7B-28L); the difference of `count_parameters` is the residue.

    Raises:
        ValueError: if the block costs more than the whole FFN.
    """
    cost = block.num_parameters(size.geometry)
    width = size.intermediate_size - cost / (size.ffn_matrices * size.hidden_size * max(size.num_experts, 1))
    rounded = round(width / size.ffn_multiple) * size.ffn_multiple
    if rounded < 1:
        raise ValueError(
            f"{block.describe()} costs {cost} parameters per block, more than the FFN of size {size.name!r}; "
            "choose a cheaper variant or a wider FFN"
        )
    return replace(size, intermediate_size=rounded)
