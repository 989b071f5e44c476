"""Records of an older version, and what a hand can do to them; the message names the file and the field."""

import json
import os
from pathlib import Path

import numpy as np

from gated_attention.study.record import read_arrays, write_arrays

OLD = Path(__file__).parent / "records_of_4a80ab3"


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return lambda folder: edited(folder / "result.json", change)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def save_one_array(folder):
    with (folder / "arrays.npz").open("wb") as file:
        np.save(file, np.zeros(3))


def append(line):
    def change(folder):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(line)

    return change


def store(**arrays):
    return lambda folder: write_arrays(folder / "arrays.npz", {**read_arrays(folder / "arrays.npz"), **arrays})


EDITS = {
    "config null": (put("config", value=None), "result.json", "config"),
    "config a list": (put("config", value=[]), "result.json", "config"),
    "train null": (put("config", "train", value=None), "result.json", "config.train"),
    "steps a word": (put("config", "train", "steps", value="3"), "result.json", "config.train.steps"),
    "steps 0": (put("config", "train", "steps", value=0), "result.json", "config.train.steps"),
    "rate a word": (put("config", "train", "learning_rate", value="fast"), "result.json", "config.train.learning_rate"),
    "cites a number": (put("config", "variant", "cites", value=5), "result.json", "config.variant.cites"),
    "description null": (put("config", "variant", "description", value=None), "result.json", "variant.description"),
    "parameters words": (put("config", "parameters", "total", value="1M"), "result.json", "config.parameters.total"),
    "source a number": (put("config", "data", "source", value=1), "result.json", "config.data.source"),
    "seed a word": (put("seed", value="0"), "result.json", "seed"),
    "seed of another": (put("seed", value=7), "result.json", "baseline seed 7"),
    "variant of another": (put("variant", value="other"), "result.json", "other seed 0"),
    "tokens null": (put("tokens_seen", value=None), "result.json", "tokens_seen"),
    "device null": (put("device", value=None), "result.json", "device"),
    "versions a list": (put("versions", value=["2.13"]), "result.json", "versions"),
    "measure null": (put("measures", "f_attn", value=None), "result.json", "measures.f_attn"),
    "value a word": (put("measures", "f_attn", "value", value="high"), "result.json", "measures.f_attn.value"),
    "n half": (put("measures", "f_attn", "n", value=1.5), "result.json", "measures.f_attn.n"),
    "layers words": (put("measures", "f_attn", "per_layer", value=["x"]), "result.json", "measures.f_attn.per_layer.0"),
    "unit missing": (put("measures", "f_attn", value={"value": 1.0, "n": 1}), "result.json", "measures.f_attn.unit"),
    "schema a list": (put("schema", value=[]), "result.json", "schema"),
    "schema 2": (put("schema", value=2), "result.json", "schema 2"),
    "no JSON": (lambda folder: (folder / "result.json").write_bytes(b"\x00\xff"), "result.json", "JSON"),
    "UTF-16": (lambda folder: (folder / "result.json").write_text("{}", encoding="utf-16"), "result.json", "JSON"),
    "a folder": (lambda folder: replace_by_folder(folder / "result.json"), "result.json", "Is a directory"),
    "metrics 5": (append("5\n"), "metrics.jsonl line 7", "wrong"),
    "metrics a word": (append('{"step": "7"}\n'), "metrics.jsonl line 7", "step"),
    "metrics negative": (append('{"step": -7}\n'), "metrics.jsonl line 7", "step"),
    "metrics without step": (append('{"loss_nats": 1.0}\n'), "metrics.jsonl line 7", "step"),
    "metrics loss a list": (append('{"step": 7, "loss_nats": []}\n'), "metrics.jsonl line 7", "loss_nats"),
    "metrics torn amid": (append('{"step": 7, "lo\n{"step": 8}\n'), "metrics.jsonl line 7", "JSON"),
    "metrics bytes": (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\n"), "metrics.jsonl line 1", "JSON"),
    "metrics a folder": (lambda folder: replace_by_folder(folder / "metrics.jsonl"), "metrics.jsonl", "Is a directory"),
    "maps flat": (store(attention_maps=np.zeros(3)), "arrays.npz", "attention_maps"),
    "maps of words": (store(attention_maps=np.array([[["a"]]])), "arrays.npz", "attention_maps"),
    "maps of more layers": (store(attention_layers=np.arange(9)), "arrays.npz", "attention_maps"),
    "layers not counted": (store(attention_layers=np.array([np.nan])), "arrays.npz", "attention_layers"),
    "one array": (save_one_array, "arrays.npz", "not an archive"),
    "histogram alone": (store(gate_histogram_sdpa=np.ones((1, 3))), "arrays.npz", "gate_histogram_sdpa"),
    "arrays cut": (lambda folder: os.truncate(folder / "arrays.npz", 900), "arrays.npz", "not an archive"),
    "arrays a folder": (lambda folder: replace_by_folder(folder / "arrays.npz"), "arrays.npz", "Is a directory"),
}
