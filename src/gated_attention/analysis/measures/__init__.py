"""The measures, one definition each, as functions of what a layer computes.

Every measure has one value per sequence (and head), computed in float32 or wider. A measure of a model is the mean over
sequences in float64, unless it is a maximum. `definitions.MEASURES` names, cites and describes them. Functions that
read whole tensors run layer by layer and keep little of them. What follows from that is computed for all layers at
once, because each small kernel costs a launch, and a median over one row keeps one multiprocessor of a GPU busy.
"""

from gated_attention.analysis.measures.hidden_states import (
    MASSIVE,
    MASSIVE_OVER_MEDIAN,
    ActivationRows,
    activation_rows,
    activations,
    head_shares,
    inf_norm,
    kurtosis,
    moments,
)
from gated_attention.analysis.measures.rank import effective_rank
from gated_attention.analysis.measures.scores import (
    NUM_BINS,
    GateScores,
    channel_scores,
    gate_histograms,
    gate_scores,
    score_range,
)
from gated_attention.analysis.measures.sinks import (
    FIRST_QUERIES,
    AttentionRows,
    attention_rows,
    value_drain,
    value_ratios,
    whole_attention,
)
from gated_attention.analysis.measures.updates import head_updates, sampled_outputs

__all__ = [
    "FIRST_QUERIES", "MASSIVE", "MASSIVE_OVER_MEDIAN", "NUM_BINS", "ActivationRows", "AttentionRows", "GateScores",
    "activation_rows", "activations", "attention_rows", "channel_scores", "effective_rank", "gate_histograms",
    "gate_scores", "head_shares", "head_updates", "inf_norm", "kurtosis", "moments", "sampled_outputs", "score_range",
    "value_drain", "value_ratios", "whole_attention",
]  # fmt: skip
