"""The architectures of decoders that studies train, as data: one row per family of transformers.

A row says what a size means in the family and which variants the family can carry. What it does not name is the
family's own default: activation, norms, their places, biases, initialisation.
"""

from dataclasses import dataclass, replace

from gated_attention.ranges import require_choice
from gated_attention.registry.variants import Variant
from gated_attention.sizes import ModelSize
from gated_attention.spec import BlockSpec

OWN = "qwen3"
"""The architecture of this package's own classes, which carry every variant; the default."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Layers that see only the nearest tokens.

    Attributes:
        divisor: The window is the context divided by this.
        full_every: Each of these layers sees the whole context instead, and the last; 0 is none.
    """

    divisor: int
    full_every: int = 0

    def describe(self) -> str:
        """Which layers see how much."""
        if not self.full_every:
            return f"every layer sees 1/{self.divisor} of the context"
        return f"one layer in {self.full_every} sees the whole context, the others 1/{self.divisor} of it"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of decoders.

    Attributes:
        model_type: transformers' name of the configuration; empty for this package's own Qwen3.
        title: Its name in sentences.
        ffn_matrices: As `ModelSize.ffn_matrices`; an FFN of two is half as wide again, so that it costs the same.
        fills_hidden: Whether all heads together are as wide as the hidden size; a size then has so many heads of its
            `head_dim`.
        shares_keys: Whether query heads may share key/value heads, as many as in Qwen3.
        rope_fraction: Share of a head's channels that one rotation turns, whose base is the size's; None where
            positions are learned, or where layers differ in their rotation.
        packs_documents: Whether packed documents can be kept apart.
        windows: None where every layer sees the whole context.
        renamed: The family's names for fields of a size, where they differ from Qwen3's.
        copied: Other fields of its configuration that must equal a field of the size.
        fixed: Other fields with a value of their own.
    """

    name: str
    model_type: str
    title: str
    ffn_matrices: int = 3
    fills_hidden: bool = False
    shares_keys: bool = True
    rope_fraction: float | None = 1.0
    packs_documents: bool = True
    windows: Windows | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    copied: tuple[tuple[str, str], ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether its classes are this package's."""
        return self.name == OWN

    def fit(self, size: ModelSize) -> ModelSize:
        """What a size is in this architecture.

        Raises:
            ValueError: for a mixture of experts, which only our own has.
        """
        if self.is_own:
            return size
        if size.num_experts:
            raise ValueError(
                f"size {size.name!r} is a mixture of experts, which only architecture {OWN!r} has; choose a dense size"
            )
        shared = size.num_attention_heads // size.num_key_value_heads if self.shares_keys else 1
        heads = size.hidden_size // size.head_dim if self.fills_hidden else size.num_attention_heads
        size = replace(size, num_attention_heads=heads, num_key_value_heads=heads // shared)
        width = size.intermediate_size * size.ffn_matrices // self.ffn_matrices
        return replace(size, intermediate_size=width, ffn_matrices=self.ffn_matrices)

    def check(self, variant: Variant) -> None:
        """Refuse a variant that this architecture cannot carry.

        Raises:
            ValueError: with the reason.
        """
        if self.is_own:
            return
        block, name = variant.block, f"variant {variant.name!r}"
        cure = f"choose another variant, or architecture {OWN!r}"
        if block != BlockSpec(block.gates):
            raise ValueError(f"{name} is {block.describe()}; architecture {self.name!r} carries gates only; {cure}")
        if any(gate.input == "lse" for gate in block.gates):
            raise ValueError(f"{name} reads the log-sum-exp, which architecture {self.name!r} does not return; {cure}")
        for field, _ in variant.widen:
            if self.fills_hidden and (field == "num_attention_heads" or not self.shares_keys):
                raise ValueError(f"{name} adds heads; those of architecture {self.name!r} fill its hidden size; {cure}")


_HALF_WINDOW = Windows(2)
_MOSTLY_WINDOWS = Windows(4, full_every=6)

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(OWN, "", "Qwen3"),
        Architecture("qwen2", "qwen2", "Qwen2"),
        Architecture("llama", "llama", "Llama", fills_hidden=True),
        Architecture("mistral", "mistral", "Mistral", windows=_HALF_WINDOW),
        Architecture("gemma3", "gemma3_text", "Gemma 3", fills_hidden=True, rope_fraction=None,
                     windows=_MOSTLY_WINDOWS,
                     copied=(("query_pre_attn_scalar", "head_dim"),)),
        Architecture("olmo2", "olmo2", "OLMo 2"),
        Architecture("gpt_neox", "gpt_neox", "GPT-NeoX", ffn_matrices=2, fills_hidden=True, shares_keys=False,
                     rope_fraction=0.25),
        Architecture("opt", "opt", "OPT", ffn_matrices=2, fills_hidden=True, shares_keys=False, rope_fraction=None,
                     packs_documents=False, renamed=(("intermediate_size", "ffn_dim"),),
                     copied=(("word_embed_proj_dim", "hidden_size"),), fixed=(("dropout", 0.0),)),
    )
}  # fmt: skip
"""Every architecture by name; a new one is a new row."""


def get_architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        ValueError: if there is none.
    """
    require_choice("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]
