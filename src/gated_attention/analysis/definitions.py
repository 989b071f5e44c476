"""Every measure by name: its title, unit, axes, definition and source."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["layer", "head", "kv_head", "rank"]

_QIU = "Qiu et al., arXiv 2505.06708"
_PAPER = f"{_QIU}, Table 4"
_GU = "Gu et al., arXiv 2410.10781"
_GUO = "Guo et al., arXiv 2410.13835"
_SUN = "Sun et al., arXiv 2402.17762"
_BONDARENKO = "Bondarenko et al., arXiv 2306.12929"
_FESSER = "Fesser et al., arXiv 2606.08105"
_ROY = "Roy and Vetterli, EUSIPCO 2007"


@dataclass(frozen=True, slots=True)
class Definition:
    """One measure.

    Attributes:
        title: Its name in tables and on axes.
        unit: `share` is 0 to 1; `1` has none.
        axes: What it has one value for. A head is a query head; at a gate it is one of the heads that the gate scores.
        text: What it is, and the order of the reductions.
        source: Where the definition comes from; empty if it is ours.
        over_layers: How the layers' numbers become one for the model, after the mean over heads.
        full: Whether it needs `level="full"`.
    """

    title: str
    unit: str
    axes: tuple[Axis, ...]
    text: str
    source: str = ""
    over_layers: Literal["mean", "max"] = "mean"
    full: bool = False


QUANTILES = (5, 25, 50, 75, 95)
"""Quantiles of gate scores, in percent."""

KINDS = {"cls": "class tokens", "register": "registers", "sep": "separators", "content": "patches or tokens"}
"""What a position may be (`encoders.PositionKind`), in words."""

_HEADS: tuple[Axis, ...] = ("layer", "head")
_LAYERS: tuple[Axis, ...] = ("layer",)

MEASURES: dict[str, Definition] = {
    "f_attn": Definition(
        "F-Attn", "share", _HEADS,
        "attention to the first token of a sequence, averaged over all queries but the first, which sees nothing else "
        "(over all where attention looks ahead), then over sequences; a learned sink (gpt-oss) is part of the "
        "denominator and not a token", _PAPER,
    ),
    "f_attn_late": Definition(
        "F-Attn, first four queries left out", "share", _HEADS, "F-Attn from the fifth query on", _PAPER,
    ),
    "f_attn_start": Definition(
        "F-Attn at document starts", "share", _HEADS,
        "F-Attn over the sequences whose first token begins a document", _PAPER,
    ),
    "f_attn_middle": Definition(
        "F-Attn mid-document", "share", _HEADS,
        "F-Attn over the sequences whose first token lies inside a document", _PAPER,
    ),
    "f_attn_uniform": Definition(
        "F-Attn, uniform", "share", _LAYERS,
        "F-Attn if every query spread its attention evenly over the tokens that it sees",
    ),
    "f_attn_late_uniform": Definition(
        "F-Attn, uniform, first four queries left out", "share", _LAYERS,
        "F-Attn from the fifth query on under uniform attention",
    ),
    "sink_rate": Definition(
        "Sink^0.3", "share", _HEADS,
        "share of sequences whose first token gets more than 0.3 of attention, averaged over all queries that see it, "
        "the first included; it depends on the length of the sequences", _GU,
    ),
    "sink_position": Definition(
        "Strongest position", "position", _HEADS,
        "position, among the first 32 and within the first half, of the key with the most attention, averaged over the "
        "queries that see it, then over sequences; where attention looks ahead, any position, that of each sequence by "
        "itself, and this is the most frequent", _GU,
    ),
    "sink_share": Definition(
        "Attention to the strongest position", "share", _HEADS, "attention to the key at the strongest position", _GU,
    ),
    "peak": Definition(
        "Attention to the strongest key", "share", _HEADS,
        "attention to the strongest key of each sequence, anywhere in its first half (anywhere where attention looks "
        "ahead), averaged over the queries that see it, then over sequences", full=True,
    ),
    "peak_elsewhere": Definition(
        "Strongest key is not the first", "share", _HEADS,
        "share of sequences whose strongest key is not token 0", full=True,
    ),
    "entropy": Definition(
        "Attention entropy", "nats", _HEADS,
        "entropy of a query's attention weights, averaged over queries, then over sequences; a learned sink counts as "
        "one more key", full=True,
    ),
    "entropy_uniform": Definition(
        "Attention entropy, uniform", "nats", _LAYERS,
        "attention entropy under uniform attention: the mean logarithm of the number of keys that a query sees",
        full=True,
    ),
    "value_drain": Definition(
        "Value drain", "1", ("layer", "kv_head"),
        "norm of the first token's value over the median norm of the other tokens' values, averaged over sequences; "
        "well below 1 for a sink that takes attention and adds nothing", _GUO,
    ),
    "sink_value": Definition(
        "Value of the strongest position", "1", _HEADS,
        "norm of the value at the strongest position, which the head's key/value head holds, over the median norm of "
        "the sequence's values, averaged over sequences", f"{_FESSER}, over the mean of the others there",
    ),
    "update_rank": Definition(
        "Stable rank of the update", "1", _HEADS,
        "|O|_F^2 / |O|_2^2 of a head's outputs O (tokens, head_dim), as the output projection reads them, over 256 "
        "evenly spaced tokens of a sequence, averaged over sequences; 1 if every token gets the same direction",
        f"{_FESSER}, before the gate and after the output projection there",
    ),
    "update_constant": Definition(
        "Constant share of the update", "share", _HEADS,
        "T |mean O|^2 / |O|_F^2 over the same T tokens: the share of a head's squared output that is one constant "
        "vector, averaged over sequences",
    ),
    **{
        name: definition
        for kind, words in KINDS.items()
        for name, definition in {
            f"attention_{kind}": Definition(
                f"Attention to {words}", "share", _HEADS,
                f"attention to all positions that are {words} together, averaged over queries, then over sequences",
            ),
            f"strongest_{kind}": Definition(
                f"Attention to the strongest of {words}", "share", _HEADS,
                f"attention to the strongest position of each sequence among {words}, averaged over the queries that "
                "see it, then over sequences",
            ),
        }.items()
    },
    "no_op_sink": Definition(
        "No-op sinks", "share", _HEADS,
        "share of sequences in which a head has more than 0.3 of its attention on the strongest position, whose value "
        "is at most 0.2 of the median: it attends and adds nothing", f"{_FESSER}; 0.3 is from {_GU}",
    ),
    "broadcast_sink": Definition(
        "Broadcast sinks", "share", _HEADS,
        "share of sequences in which a head has more than 0.3 of its attention on the strongest position, whose value "
        "is at least 0.5 of the median, and whose update has a stable rank of at most 1.5: it adds one value to all",
        f"{_FESSER}; 0.3 is from {_GU}",
    ),
    "ablation": Definition(
        "Rise without the head", "nats/token", _HEADS,
        "rise of the next-token loss where a head's output, as the output projection reads it, is replaced by its mean "
        "at each position, taken from other passages; averaged over sequences",
    ),
    "ablation_error": Definition(
        "Rise without the head, standard error", "nats/token", _HEADS, "standard error of that mean over sequences",
    ),
    "layer_ablation": Definition(
        "Rise without the layer's heads", "nats/token", _LAYERS, "the same with all heads of a layer replaced together",
    ),
    "layer_ablation_error": Definition(
        "Rise without the layer's heads, standard error", "nats/token", _LAYERS,
        "standard error of that mean over sequences",
    ),
    "m_act": Definition(
        "M-Act", "1", _LAYERS,
        "largest absolute hidden state of any token at the layer's output, over all sequences; for a model, the mean "
        "over layers", _PAPER,
    ),
    "top_activations": Definition(
        "Top 3 activations", "1", ("layer", "rank"),
        "the three largest absolute hidden states of a sequence, averaged over sequences", _SUN,
    ),
    "median_activation": Definition(
        "Median activation", "1", _LAYERS,
        "median absolute hidden state of a sequence, over 64 evenly spaced tokens and all channels, averaged over "
        "sequences", _SUN,
    ),
    "massive_tokens": Definition(
        "Tokens with massive activations", "tokens per sequence", _LAYERS,
        "tokens of a sequence with an absolute hidden state above 100 and above 1000 times the median of the sequence, "
        "averaged over sequences", _SUN,
    ),
    "inf_norm": Definition(
        "Inf norm", "1", _LAYERS,
        "largest absolute output of the attention block, averaged over sequences", _BONDARENKO, over_layers="max",
    ),
    "kurtosis": Definition(
        "Kurtosis", "1", _LAYERS,
        "fourth central moment over the squared variance of the attention block's output, over the tokens and channels "
        "of a sequence, averaged over sequences; 3 for a normal distribution", _BONDARENKO,
    ),
    "size_before_gate": Definition(
        "|SDPA output| before the gate", "1", _HEADS,
        "mean absolute output of attention over tokens and channels, then over sequences", _QIU,
    ),
    "size_after_gate": Definition(
        "|SDPA output| after the gate", "1", _HEADS, "the same for the input of the output projection", _QIU,
    ),
    "sparsity_1e-2": Definition(
        "Below 1e-2", "share", _HEADS,
        "share of absolute values below 0.01 in the input of the output projection, over tokens and channels, then "
        "over sequences", _QIU,
    ),
    "sparsity_1e-3": Definition("Below 1e-3", "share", _HEADS, "the same below 0.001", _QIU),
    "effective_rank": Definition(
        "Effective rank of W_V W_O", "1", _HEADS,
        "exponential of the entropy of the normalised singular values of a head's W_V W_O, from the weights alone; at "
        "most head_dim", _ROY, full=True,
    ),
    "effective_rank_gated": Definition(
        "Effective rank with the gate", "1", _HEADS,
        "the same for W_V diag(g) W_O, where g is the mean score per channel of the multiplicative gates between them",
        _ROY, full=True,
    ),
}  # fmt: skip
"""Measures of a model, by their names in files."""

GATE_MEASURES: dict[str, Definition] = {
    "gate_mean": Definition(
        "Gate mean", "1", _HEADS, "score after the activation, averaged over channels, tokens and sequences", _PAPER,
    ),
    "gate_share_below_0.1": Definition(
        "Gate below 0.1", "share", _HEADS, "share of scores below 0.1, over channels, tokens and sequences",
    ),
    "gate_share_above_0.9": Definition(
        "Gate above 0.9", "share", _HEADS, "share of scores above 0.9, over channels, tokens and sequences",
    ),
    "gate_share_open": Definition(
        "Gate open", "share", _HEADS,
        "share of scores above 0, over channels, tokens and sequences; only a hard sigmoid closes completely",
    ),
    "gate_first": Definition(
        "Gate at the first token", "1", _HEADS,
        "score of the first token of each sequence, averaged over channels, then over sequences",
    ),
    "gate_rest": Definition(
        "Gate at the other tokens", "1", _HEADS,
        "score of all other tokens, averaged over channels, tokens and sequences",
    ),
    **{
        f"gate_quantile_{percent:02d}": Definition(
            f"Gate, {percent} % quantile", "1", _HEADS,
            "score below which that share lies, by linear interpolation within the bins of a histogram; it has 50 bins "
            "and counts 256 evenly spaced tokens per sequence",
        )
        for percent in QUANTILES
    },
}  # fmt: skip
"""Measures of the gates at one site."""

ALL = {**MEASURES, **GATE_MEASURES}
