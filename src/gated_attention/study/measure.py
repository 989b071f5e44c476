"""The measures of one trained arm."""

import resource
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from gated_attention.analysis import ExpertLoad, InputBatch, Inspection, expert_load, inspect_model
from gated_attention.analysis.definitions import MEASURES
from gated_attention.evaluate import held_out_loss
from gated_attention.nn.eval_mode import evaluating
from gated_attention.study.record import Measure
from gated_attention.train.images.data import ImageData
from gated_attention.train.metrics import read_metrics
from gated_attention.train.text.data import PackedData
from gated_attention.train.trainer import TrainConfig, training_precision

INSPECTED_TOKENS = 65_536
"""Held-out tokens on which sinks, activations and gates are measured."""

INSPECTED_IMAGES = 1_024
"""Held-out images on which attention, activations and gates are measured."""

BATCH_IMAGES = 256
"""Images per forward pass of a measure."""

BATCH_TOKENS = 32_768
"""Tokens per forward pass of a measure."""


_OF_IMAGES = (
    "sink_share", "sink_value", "no_op_sink", "broadcast_sink", "attention_cls", "attention_register",
    "strongest_content", "m_act",
)  # fmt: skip
"""Measures of `analysis.definitions` that a study of images records."""


def measure_arm(
    model: PreTrainedModel, data: PackedData | ImageData, settings: TrainConfig, metrics: Path
) -> tuple[dict[str, Measure], dict[str, np.ndarray]]:
    """Every measure of a trained model, and the arrays that its figures show, in the precision of the training."""
    if isinstance(data, ImageData):
        return _measure_on_images(model, data, settings, metrics)
    return _measure_on_text(model, data, settings, metrics)


def _measure_on_images(
    model: PreTrainedModel, data: ImageData, settings: TrainConfig, metrics: Path
) -> tuple[dict[str, Measure], dict[str, np.ndarray]]:
    """Loss and accuracy on all held-out images, attention and activations on some of them."""
    device = next(model.parameters()).device
    inspected = data.validation.sample(INSPECTED_IMAGES).batches(BATCH_IMAGES)
    with training_precision(device, settings):
        loss, accuracy, num_images = _classified(model, data.validation.batches(BATCH_IMAGES))
        inspection = inspect_model(model, (InputBatch({"pixel_values": one["pixel_values"]}) for one in inspected))
    n = inspection.num_sequences
    measures = {
        "val_loss_nats": Measure(loss, "nats/image", num_images),
        "accuracy": Measure(accuracy, "share", num_images),
        **{
            name: _layered(inspection.by_layer(name), MEASURES[name].unit, n)
            for name in _OF_IMAGES
            if name in inspection.measures
        },
        **_gate_measures(model, inspection),
        **_training_measures(metrics, "nats/image"),
        "peak_memory_gib": Measure(_peak_memory_gib(device), "GiB", 1),
    }
    return measures, _arrays(inspection)


def _classified(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> tuple[float, float, int]:
    """Mean cross-entropy of the label in nats, the share of images whose likeliest label is right, and their number."""
    num_images = 0
    with evaluating(model) as device:
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            labels = batch["labels"].to(device)
            logits = model(pixel_values=batch["pixel_values"].to(device)).logits.float()
            right = (logits.argmax(-1) == labels).sum()
            totals += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right]).double()
            num_images += len(labels)
    loss, accuracy = (totals / num_images).tolist()
    return loss, accuracy, num_images


def _measure_on_text(
    model: PreTrainedModel, data: PackedData, settings: TrainConfig, metrics: Path
) -> tuple[dict[str, Measure], dict[str, np.ndarray]]:
    """The loss is measured on blocks packed as in training.

    Sinks, activations and gates are of blocks read as one sequence, or as one document where documents are kept apart.
    """
    device = next(model.parameters()).device
    batch_size = max(1, BATCH_TOKENS // data.validation.ids.shape[1])
    batches = data.validation.batches(batch_size)
    inspected = data.validation.undivided().sample(INSPECTED_TOKENS).id_batches(batch_size)
    with training_precision(device, settings):
        loss = held_out_loss(model, batches)
        inspection = inspect_model(model, inspected)
        experts = expert_load(model, inspected)
    n = inspection.num_tokens
    measures = {
        "val_loss_nats": Measure(loss.loss_nats, "nats/token", loss.num_tokens),
        "val_perplexity": Measure(loss.perplexity, "1", loss.num_tokens),
        "f_attn": _layered(inspection.by_layer("f_attn"), "share", n),
        "f_attn_uniform": Measure(inspection.overall("f_attn_uniform"), "share", n),
        "m_act": _layered(inspection.by_layer("m_act"), "1", n),
        **_gate_measures(model, inspection),
        **(_expert_measures(experts) if experts else {}),
        **_training_measures(metrics),
        "peak_memory_gib": Measure(_peak_memory_gib(device), "GiB", 1),
    }
    return measures, {**_arrays(inspection), **({"expert_load": experts.load} if experts else {})}


def _gate_measures(model: PreTrainedModel, inspection: Inspection) -> dict[str, Measure]:
    """Gate scores averaged over sites, per layer and over layers; only a hard sigmoid has scores of exactly 0."""
    sites = list(inspection.gates)
    hard_sites = [gate.site for gate in getattr(model.config, "gates", ()) if gate.activation == "hard_sigmoid"]
    measures = {}
    for name, of_gate, averaged in (
        ("gate_score_mean", "gate_mean", sites),
        ("gate_share_below_0.1", "gate_share_below_0.1", sites),
        ("gate_share_above_0.9", "gate_share_above_0.9", sites),
        ("gate_open_share", "gate_share_open", hard_sites),
    ):
        if averaged:
            scores = [inspection.gates[site].by_layer(of_gate) for site in averaged]
            measures[name] = _layered(np.mean(scores, axis=0), "share", inspection.num_tokens)
    return measures


def _expert_measures(experts: ExpertLoad) -> dict[str, Measure]:
    """Load of the busiest and the idlest expert, and the number of unused experts, per layer and over layers."""
    return {
        "expert_load_max": _layered(experts.load.max(1), "1", experts.num_tokens, np.max),
        "expert_load_min": _layered(experts.load.min(1), "1", experts.num_tokens, np.min),
        "dead_experts": _layered(experts.num_dead, "experts", experts.num_tokens, np.sum),
    }


def _training_measures(metrics: Path, unit: str = "nats/token") -> dict[str, Measure]:
    """The last training loss, and throughput as the median over the run's log intervals."""
    lines = [line for line in read_metrics(metrics) if "loss_nats" in line]
    measures = {"train_loss_nats": Measure(lines[-1]["loss_nats"], unit, 1)} if lines else {}
    if speeds := [line["tokens_per_s"] for line in lines if line["tokens_per_s"]]:
        measures["train_tokens_per_s"] = Measure(median(speeds), "tokens/s", len(speeds))
    return measures


def _layered(per_layer: np.ndarray, unit: str, n: int, reduce: Callable[[np.ndarray], Any] = np.mean) -> Measure:
    return Measure(float(reduce(per_layer)), unit, n, per_layer=tuple(map(float, per_layer)))


def _peak_memory_gib(device: torch.device) -> float:
    """Device memory of this arm on CUDA; resident memory of the whole process so far elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _arrays(inspection: Inspection) -> dict[str, np.ndarray]:
    arrays = {"attention_maps": inspection.attention_maps, "attention_layers": inspection.attention_layers}
    for site, gate in inspection.gates.items():
        arrays |= {f"gate_histogram_{site}": gate.histogram.sum(1), f"gate_edges_{site}": gate.edges}
    return arrays
