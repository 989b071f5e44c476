"""The measures, one definition each, as functions of what a layer computes.

Every measure is one value per sequence (and head), formed in float32 or wider; a measure of a model is
their mean over sequences in float64, unless it is a maximum. `definitions.MEASURES` names, cites and words
them. What reads whole tensors runs layer by layer and keeps little; what a measure takes from that is
formed of all layers at once, because small kernels cost a launch each and a median over one row keeps
one multiprocessor of a GPU busy.
"""

from gated_attention.analysis.measures.hidden_states import (
    MASSIVE,
    MASSIVE_OVER_MEDIAN,
    MEDIAN_TOKENS,
    SPARSITY,
    TOP_ACTIVATIONS,
    ActivationRows,
    Activations,
    activation_rows,
    activations,
    head_shares,
    inf_norm,
    kurtosis,
    mean_size,
    moments,
)
from gated_attention.analysis.measures.rank import (
    effective_rank,
)
from gated_attention.analysis.measures.scores import (
    HISTOGRAM_TOKENS,
    NUM_BINS,
    GateScores,
    channel_scores,
    gate_histograms,
    gate_scores,
    score_range,
)
from gated_attention.analysis.measures.sinks import (
    CANDIDATE_KEYS,
    FIRST_QUERIES,
    AttentionRows,
    SinkColumns,
    WholeAttention,
    attention_rows,
    sink_columns,
    value_drain,
    value_norms,
    whole_attention,
)

__all__ = [
    "CANDIDATE_KEYS",
    "FIRST_QUERIES",
    "HISTOGRAM_TOKENS",
    "MASSIVE",
    "MASSIVE_OVER_MEDIAN",
    "MEDIAN_TOKENS",
    "NUM_BINS",
    "SPARSITY",
    "TOP_ACTIVATIONS",
    "ActivationRows",
    "Activations",
    "AttentionRows",
    "GateScores",
    "SinkColumns",
    "WholeAttention",
    "activation_rows",
    "activations",
    "attention_rows",
    "channel_scores",
    "effective_rank",
    "gate_histograms",
    "gate_scores",
    "head_shares",
    "inf_norm",
    "kurtosis",
    "mean_size",
    "moments",
    "score_range",
    "sink_columns",
    "value_drain",
    "value_norms",
    "whole_attention",
]
