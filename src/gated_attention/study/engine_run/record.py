"""The record of a run, in the form that reports read."""

import resource
from dataclasses import asdict, replace
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gated_attention.device import device_name
from gated_attention.engine.run.run_file import Run
from gated_attention.engine.run.shape import variant_of
from gated_attention.sizes import count_parameters
from gated_attention.study.record import SCHEMA, Measure, Result
from gated_attention.train.metrics import read_metrics
from gated_attention.train.trainer import TrainConfig
from gated_attention.versions import git_commit, library_versions


def settings(run: Run) -> dict[str, Any]:
    """What `config.json` holds: all that determines the run's numbers."""
    file, chosen = run.file, variant_of(run.file.model)
    data, optimizer = file.data, file.optimizer
    training = TrainConfig(
        steps=run.steps,
        batch_size=run.micro,
        accumulation=(file.batch.sequences or 1) // run.micro,
        learning_rate=run.learning_rate,
        min_learning_rate=file.schedule.min_learning_rate,
        warmup=file.schedule.warmup or 0.0,
        weight_decay=optimizer.weight_decay,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        max_grad_norm=optimizer.max_grad_norm,
        precision=file.precision.compute or "float32",
        compile=bool(file.precision.compile),
        log_every=file.evaluation.log_every or 1,
        evaluate_every=file.evaluation.every or 1,
        checkpoint_every=file.checkpoints.every or 1,
    )
    config = {
        "variant": {
            "name": run.variant,
            "description": chosen.describe() if chosen else run.block.describe(),
            "cites": list(chosen.cites) if chosen else [],
        },
        "size": {**asdict(run.size), "name": file.model.size or "custom"},
        "block": {**asdict(run.block), "gates": [gate.to_dict() for gate in run.block.gates]},
        "parameters": count_parameters(run.size, run.block).to_dict(),
        "data": {
            "source": data.text or ", ".join(data.paths),
            "validation": data.validation,
            "text_field": data.text_field,
            "tokenizer": data.tokenizer or "of the shards",
            "block_size": run.context,
            "bos": data.bos,
            "packing": data.packing,
        },
        "train": {
            **{key: value for key, value in asdict(training).items() if key != "auxiliary"},
            **({"auxiliary": asdict(file.auxiliary)} if run.size.num_experts else {}),
        },
        "engine": asdict(replace(file.parallel)),
    }
    return {"schema": SCHEMA, "study": file.name, "variant": run.variant, "seed": file.seed, "config": config}


def record(run: Run, metrics: Path, model: dict[str, Any]) -> Result:
    """The record of a finished run, from its metrics."""
    lines = read_metrics(metrics)
    trained = [line for line in lines if line.get("loss_nats") is not None]
    scored = [line["val_loss_nats"] for line in lines if line.get("val_loss_nats") is not None]
    speeds = [line["tokens_per_s"] for line in trained if line["tokens_per_s"]]
    targets = (run.file.evaluation.tokens or 0) // run.context * (run.context - 1)
    measures: dict[str, Measure] = {}
    if scored:
        measures["val_loss_nats"] = Measure(scored[-1], "nats/token", targets)
        measures["val_perplexity"] = Measure(exp(scored[-1]), "1", targets)
    if trained:
        measures["train_loss_nats"] = Measure(trained[-1]["loss_nats"], "nats/token", 1)
    if speeds:
        measures["train_tokens_per_s"] = Measure(median(speeds), "tokens/s", len(speeds))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    measures["peak_memory_gib"] = Measure(peak, "GiB", 1)
    gpus = run.file.parallel.gpus
    return Result(
        study=run.file.name,
        variant=run.variant,
        seed=run.file.seed,
        config={**settings(run)["config"], "model": model, "study_learning_rate": run.file.optimizer.learning_rate},
        measures=measures,
        tokens_seen=trained[-1]["tokens"] if trained else 0,
        device=f"{gpus} x {device_name(device)}" if gpus > 1 else device_name(device),
        git_commit=git_commit(),
        versions=library_versions(),
    )
