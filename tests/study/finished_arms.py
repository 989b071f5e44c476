"""Records of finished arms, for tests of reports to write without training."""

import json
from dataclasses import replace
from math import nan

import numpy as np

from gated_attention.report.study.page import write_report
from gated_attention.study.record import Measure, Result, write_arrays, write_json, write_result

STEPS = range(10, 101, 10)
LAYERS = 3


def write_arm(
    study, variant, seed, loss=2.0, *, cites=(), f_attn=0.05, m_act=12.0, gate=None, maps=False, config=None, **changes
):
    """The records of one finished arm; `loss` falls to its value over the steps, or is NaN from half-way on."""
    folder = study / variant / f"seed{seed}"
    folder.mkdir(parents=True)
    resolved = {
        "variant": {"name": variant, "description": f"G1 {variant}", "cites": list(cites)},
        "size": {"name": "tiny"},
        "model": {"num_hidden_layers": LAYERS, "hidden_size": 128, "num_attention_heads": 6, "num_key_value_heads": 3},
        "parameters": {"total": 919_040},
        "data": {"source": "/home/someone/corpus.jsonl", "tokenizer": "bytes", "block_size": 256, "bos": False},
        "train": {
            "steps": 100,
            "batch_size": 8,
            "learning_rate": 0.004,
            "warmup": 0.02,
            "precision": "float32",
            "compile": False,
        },
        **(config or {}),
    }
    measures = {
        "val_loss_nats": Measure(loss, "nats/token", 1000),
        "val_perplexity": Measure(float(np.exp(loss)), "1", 1000),
        "f_attn": Measure(f_attn, "share", 500, per_layer=(f_attn,) * LAYERS),
        "f_attn_uniform": Measure(0.02, "share", 500),
        "m_act": Measure(m_act, "1", 500, per_layer=(m_act,) * LAYERS),
        "train_tokens_per_s": Measure(20_000.0, "tokens/s", 9),
    }
    arrays = {}
    if maps:
        arrays["attention_maps"] = np.tril(np.full((1, 8, 8), 0.1, np.float16))
        arrays["attention_layers"] = np.array([1])
    if gate is not None:
        measures["gate_score_mean"] = Measure(gate, "share", 500, per_layer=(gate,) * LAYERS)
        arrays["gate_histogram_sdpa"] = np.arange(1, 13).reshape(LAYERS, 4)
        arrays["gate_edges_sdpa"] = np.linspace(0, 1, 5)
    curve = [nan if np.isnan(loss) and step > 50 else (2.0 if np.isnan(loss) else loss) + 30 / step for step in STEPS]
    lines = [{"step": step, "loss_nats": value} for step, value in zip(STEPS, curve, strict=True)]
    lines += [{"step": step, "val_loss_nats": value} for step, value in zip(STEPS, curve, strict=True)][1::3]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_json(folder / "config.json", {"config": resolved})
    write_arrays(folder / "arrays.npz", arrays)
    result = Result(
        study.name, variant, seed, resolved, measures, 204_800, "CPU, 2 threads", "c0ffee", {"torch": "2.13"}
    )
    write_result(folder, replace(result, **changes))
    return folder


def report_of(study, folder=None):
    folder = folder or study.parent.parent / "report"
    write_report(study, folder)
    return (folder / "report.md").read_text(encoding="utf-8")
