"""Where the attention of transformers' families keeps its projections: one row per naming and packing."""

from functools import cache
from inspect import getsource, unwrap
from typing import Literal, NamedTuple

from torch import nn

from gated_attention.nn.block import GateOwner
from gated_attention.nn.gate import GATE_MODULES
from gated_attention.spec import AttentionGeometry, GateSpec, Site

AttentionKind = Literal["all", "self", "cross"]
"""Which attention is gated where a model has both: within a sequence, or from a decoder to an encoder."""

_SEAM = "ALL_ATTENTION_FUNCTIONS"
"""transformers' table of attention functions; families whose attention calls one of them share the seam for gates."""

_HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_CROSS = {"encoder_attn", "crossattention", "cross_attention", "cross_attn", "EncDecAttention"}


class Layout(NamedTuple):
    """The names of the projections of an attention module.

    Attributes:
        query: None, as `key` and `value`, where heads come from a latent (MLA): no gate fits there.
        output: None where a sibling of the attention projects its output, `output.dense` of the module around both.
        packing: Of one projection for queries, keys and values: `blocks` has all queries, then all keys, then all
            values; `heads` has query, key and value of one head after another.
    """

    query: str | None
    key: str | None
    value: str | None
    output: str | None
    packing: Literal["blocks", "heads"] | None = None

    @property
    def names(self) -> set[str]:
        """Every projection once."""
        return {name for name in self[:4] if name is not None}


def _packed(name: str, output: str, packing: Literal["blocks", "heads"] = "blocks") -> Layout:
    return Layout(name, name, name, output, packing)


LAYOUTS: tuple[Layout, ...] = (
    Layout("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma, GLM, OLMo, gpt-oss, ViT, DINOv3
    Layout("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, Whisper, CLIP, SigLIP, wav2vec 2.0
    Layout("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    Layout("q_proj", "k_proj", "v_proj", "proj"),
    Layout("q_proj", "k_proj", "v_proj", "projection_layer"),  # InternVL
    Layout("q_proj", "k_proj", "v_proj", "Wo"),  # ModernBERT's decoder
    Layout("q", "k", "v", "o"),  # T5
    Layout("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    Layout("linear_q", "linear_k", "linear_v", "linear_out"),  # conformers
    Layout("query", "key", "value", "dense"),  # ALBERT
    Layout("query", "key", "value", "output"),  # Pix2Struct
    Layout("query", "key", "value", "proj"),  # V-JEPA 2
    Layout("query", "key", "value", None),  # BERT, RoBERTa, ELECTRA
    _packed("qkv_proj", "o_proj"),  # Phi-3
    _packed("Wqkv", "Wo"),  # ModernBERT
    _packed("c_attn", "c_proj"),  # GPT-2
    _packed("qkv", "proj"),  # the vision towers of Qwen-VL
    _packed("qkv", "projection"),  # BLIP-2
    _packed("query_key_value", "dense", "heads"),  # GPT-NeoX
    Layout(None, None, None, "o_proj"),  # DeepSeek
)
"""Tried in this order; the first whose projections are all there is the module's."""


class Attention(NamedTuple):
    """An attention module in a model, and what a gate must know of it."""

    name: str
    module: nn.Module
    layout: Layout
    sibling: nn.Module | None
    """Projects the output in a layout that has no output projection."""
    head_dim: int
    num_heads: int
    num_kv_heads: int

    def geometry(self, site: Site) -> AttentionGeometry:
        """The widths of a gate at a site, whose hidden size is that of what the gate reads.

        Raises:
            ValueError: if the site does not exist here.
        """
        read = getattr(self.layout, site) if site in ("key", "value") else self.layout.query
        if site in ("query", "key", "value") and read is None:
            raise ValueError(
                f"{type(self.module).__name__} has no {site} projection by head; choose a gate at 'sdpa' or 'output'"
            )
        output = self.output_projection
        hidden_size = widths(output)[1] if read is None else widths(getattr(self.module, read))[0]
        if site == "output" and hidden_size != widths(output)[1]:
            raise ValueError(
                f"{type(self.module).__name__} reads {hidden_size} channels and returns {widths(output)[1]}; "
                "choose a gate at another site than 'output'"
            )
        return AttentionGeometry(hidden_size, self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def output_projection(self) -> nn.Module:
        """What the concatenated heads go through."""
        owner, name = (self.sibling, "dense") if self.layout.output is None else (self.module, self.layout.output)
        projection: nn.Module = getattr(owner, name)
        return projection

    @property
    def layer(self) -> int | None:
        """The index of its layer: the first number in its name."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)

    @property
    def is_cross(self) -> bool:
        """Whether keys and values come from another sequence."""
        return bool(getattr(self.module, "is_cross_attention", False)) or bool(_CROSS & set(self.name.split(".")))

    def check(self, spec: GateSpec) -> None:
        """Refuse a gate that cannot be here.

        Raises:
            ValueError: in one line, with the cure.
        """
        if spec.input == "lse":
            raise ValueError(
                "a gate on the log-sum-exp needs attention that returns it; choose another input, or a GatedQwen3Config"
            )
        spec.in_features(self.geometry(spec.site))  # refuses a site that is not here, and too wide an input
        owner = self.sibling if spec.site == "output" and self.sibling is not None else self.module
        if hasattr(owner, name := GATE_MODULES[spec.site]):
            raise ValueError(f"{type(owner).__name__} has a {name} already; it takes no gate at {spec.site!r}")


def find_attention(model: nn.Module) -> list[Attention]:
    """Every attention module that calls transformers' attention interface, in the order of the model.

    Raises:
        ValueError: if there is none, or one has projections of unknown names.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if not calls_interface(type(module)):  # type: ignore[arg-type]  # of a cached function
            continue
        layout = layout_of(module)
        if layout is None:
            parts = ", ".join(part for part, _ in module.named_children()) or "none"
            raise ValueError(f"{type(module).__name__} keeps its projections under unknown names (it has {parts})")
        sibling = None
        if layout.output is None:
            sibling = getattr(modules[name.rpartition(".")[0]], "output", None)
            if not _is_module(sibling, "dense"):
                raise ValueError(f"{type(module).__name__} has no output.dense beside it, where its heads would go")
        found.append(_measured(Attention(name, module, layout, sibling, 0, 0, 0)))
    if not found:
        raise ValueError(
            f"{type(model).__name__} computes attention of its own, not through transformers' attention interface; "
            "gates fit models such as Llama, Gemma, GPT-NeoX, BERT, T5, ViT or Whisper"
        )
    return found


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of an attention module; None if no row fits."""
    layout = next((row for row in LAYOUTS if all(_is_module(module, part) for part in row.names)), None)
    return None if layout is not None and layout.query is None and not hasattr(module, "v_head_dim") else layout


def head_dim_of(module: nn.Module, layout: Layout, width: int) -> int:
    """Channels per head of an attention module whose query heads have that width together.

    Raises:
        ValueError: if the module does not say it.
    """
    head_dim = getattr(module, "v_head_dim", None) if layout.query is None else _first(module, _HEAD_DIMS)
    if head_dim is None:
        num_heads = _first(module, _NUM_HEADS) or _first(getattr(module, "config", None), _NUM_HEADS)
        if num_heads is None:
            raise ValueError(f"{type(module).__name__} does not say how many heads it has")
        head_dim = width // num_heads
    return int(head_dim)


def _measured(found: Attention) -> Attention:
    module, layout = found.module, found.layout
    width = widths(found.output_projection)[0]  # of all query heads
    head_dim = head_dim_of(module, layout, width)
    if layout.key is None:
        keys = width
    elif layout.packing is None:
        keys = widths(getattr(module, layout.key))[1]
    else:
        keys = (widths(getattr(module, layout.key))[1] - width) // 2
    return found._replace(head_dim=head_dim, num_heads=width // head_dim, num_kv_heads=keys // head_dim)


def widths(projection: nn.Module) -> tuple[int, int]:
    """What a projection reads and returns."""
    names = ("in_features", "out_features") if hasattr(projection, "in_features") else ("nx", "nf")  # Conv1D
    return getattr(projection, names[0]), getattr(projection, names[1])


def _first(owner: object, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), None)


def _is_module(owner: object, name: str) -> bool:
    return isinstance(getattr(owner, name, None), nn.Module)


@cache
def calls_interface(kind: type) -> bool:
    """Whether a class of modules is attention that goes through transformers' interface, with gates or without."""
    if not kind.__module__.startswith("transformers"):
        return False
    plain = next(base for base in kind.__mro__ if not issubclass(base, GateOwner))
    return _SEAM in getsource(unwrap(plain.forward))  # type: ignore[attr-defined]
