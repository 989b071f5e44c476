"""The measures of one trained arm."""

import resource
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel

from gated_attention.analysis import ExpertLoad, Inspection, expert_load, inspect_model
from gated_attention.evaluate import held_out_loss
from gated_attention.study.record import Measure
from gated_attention.train.metrics import read_metrics
from gated_attention.train.text.data import PackedData
from gated_attention.train.trainer import TrainConfig

INSPECTED_TOKENS = 65_536
"""How much held-out text sinks, activations and gates are measured on."""

BATCH_TOKENS = 32_768
"""Tokens per forward pass of a measure."""


def measure_arm(
    model: PreTrainedModel, data: PackedData, settings: TrainConfig, metrics: Path
) -> tuple[dict[str, Measure], dict[str, np.ndarray]]:
    """Every measure of a trained model, and the arrays that its figures are drawn from.

    The model is measured in the precision it was trained in. Its loss is of blocks packed as those it was trained on;
    sinks, activations and gates are of blocks read as one sequence, which holds one document where documents are kept
    apart.
    """
    device = next(model.parameters()).device
    batch_size = max(1, BATCH_TOKENS // data.validation.ids.shape[1])
    batches = data.validation.batches(batch_size)
    inspected = data.validation.undivided().sample(INSPECTED_TOKENS).id_batches(batch_size)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
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
        **_gate_measures(inspection),
        **_open_share(model, inspection),
        **(_expert_measures(experts) if experts else {}),
        **_training_measures(metrics),
        "peak_memory_gib": Measure(_peak_memory_gib(device), "GiB", 1),
    }
    return measures, {**_arrays(inspection), **({"expert_load": experts.load} if experts else {})}


def _gate_measures(inspection: Inspection) -> dict[str, Measure]:
    """Gate scores averaged over layers, then over sites, as one number each and layer by layer for a single site."""
    if not inspection.gates:
        return {}
    n = inspection.num_tokens
    measures = {}
    for name in ("gate_score_mean", "gate_share_below_0.1", "gate_share_above_0.9"):
        of_gate = name.replace("gate_score_", "gate_")
        sites = [gate.by_layer(of_gate) for gate in inspection.gates.values()]
        measures[name] = _layered(np.mean(sites, axis=0), "share", n)
    return measures


def _open_share(model: PreTrainedModel, inspection: Inspection) -> dict[str, Measure]:
    """Share of hard-sigmoid scores above 0; other activations do not close."""
    sites = [gate.site for gate in model.config.gates if gate.activation == "hard_sigmoid"]
    if not sites:
        return {}
    shares = np.mean([inspection.gates[site].by_layer("gate_share_open") for site in sites], axis=0)
    return {"gate_open_share": _layered(shares, "share", inspection.num_tokens)}


def _expert_measures(experts: ExpertLoad) -> dict[str, Measure]:
    """The busiest and the idlest expert of any layer, and layer by layer, and experts that no token reached."""
    highest, lowest, dead = experts.load.max(1), experts.load.min(1), experts.num_dead
    n = experts.num_tokens
    return {
        "expert_load_max": Measure(float(highest.max()), "1", n, per_layer=tuple(map(float, highest))),
        "expert_load_min": Measure(float(lowest.min()), "1", n, per_layer=tuple(map(float, lowest))),
        "dead_experts": Measure(float(dead.sum()), "experts", n, per_layer=tuple(map(float, dead))),
    }


def _training_measures(metrics: Path) -> dict[str, Measure]:
    """The last training loss, and throughput as the median over the run's log intervals."""
    lines = [line for line in read_metrics(metrics) if "loss_nats" in line]
    measures = {"train_loss_nats": Measure(lines[-1]["loss_nats"], "nats/token", 1)} if lines else {}
    if speeds := [line["tokens_per_s"] for line in lines if line["tokens_per_s"]]:
        measures["train_tokens_per_s"] = Measure(median(speeds), "tokens/s", len(speeds))
    return measures


def _layered(per_layer: np.ndarray, unit: str, n: int) -> Measure:
    return Measure(float(per_layer.mean()), unit, n, per_layer=tuple(float(value) for value in per_layer))


def _peak_memory_gib(device: torch.device) -> float:
    """Device memory of this arm on CUDA; resident memory of the whole process so far elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _arrays(inspection: Inspection) -> dict[str, np.ndarray]:
    arrays = {"attention_maps": inspection.attention_maps, "attention_layers": inspection.attention_layers}
    for site, gate in inspection.gates.items():
        arrays[f"gate_histogram_{site}"] = gate.histogram.sum(1)
        arrays[f"gate_edges_{site}"] = gate.edges
    return arrays
