"""Folders that carry their code, read by a process in which this package and jaxtyping cannot be imported."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM, GatedQwen3MoeConfig
from gated_attention.models.build import build_model
from gated_attention.models.saved.self_contained import generate_code, write_self_contained
from gated_attention.spec import BlockSpec, GateSpec, SwitchSpec

WIDTHS = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EVERYTHING = BlockSpec(
    gates=(
        GateSpec(head_shared=True, scale=2.0, dtype="model"),
        GateSpec("value", "headwise", input_dim=5, bias=0.5, activation="hard_sigmoid"),
        GateSpec("key", combine="add", activation="silu"),
        GateSpec("query", input="parameter", activation="ns_sigmoid"),
        GateSpec("output", activation="identity", init="zeros", bias=1.0),
    ),
    switch=SwitchSpec("key_value", num_experts=3, top_k=2),
    sdpa_transform="rms_norm",
    sandwich_norm=True,
    output_clip=3.0,
)
BLOCKS = {
    "headwise": BlockSpec(GateSpec(granularity="headwise")),
    "elementwise": BlockSpec(GateSpec()),
    "everything": EVERYTHING,
    "lse": BlockSpec(GateSpec(granularity="headwise", input="lse", bias=0.0), sdpa_transform="silu"),
    "moe": BlockSpec(GateSpec()),
    "moe-everything": EVERYTHING,
}

READER = """
import importlib.abc, os, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gated_attention", "jaxtyping"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)  # sums split over other numbers of threads differ in the last bit
root = sys.argv[1]
tokens = load_file(f"{root}/tokens.safetensors")["tokens"]

def read(folder, auto=AutoModelForCausalLM):
    model, found = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"], found
    return model.eval()

with torch.no_grad():
    for name in sys.argv[2:]:
        folder = f"{root}/{name}"
        model = read(folder)
        logits = model(tokens).logits
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
        model.save_pretrained(f"{root}/{name}-again")
        again = read(f"{root}/{name}-again")
        assert torch.equal(again(tokens).logits, logits)
        assert torch.equal(model(tokens).logits, logits)  # a second copy of the code took nothing from the first
        with open(f"{root}/{name}-again/README.md") as card:
            assert "trust_remote_code=True" in card.read()
        hidden = read(folder, AutoModel)(tokens).last_hidden_state
        save_file({"logits": logits, "generated": generated, "hidden": hidden}, f"{root}/{name}.safetensors")
assert "gated_attention" not in sys.modules and "jaxtyping" not in sys.modules
"""


def make_model(name):
    values = {field: getattr(BLOCKS[name], field) for field in BlockSpec.__dataclass_fields__}
    if name.startswith("moe"):
        return build_model(GatedQwen3MoeConfig(**WIDTHS, **EXPERTS, **values), seed=0).eval()
    return build_model(GatedQwen3Config(**WIDTHS, **values), seed=0).eval()


@torch.no_grad()
def test_a_process_without_the_package_computes_the_same(tmp_path):
    tokens = torch.randint(50, (2, 9))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    models = {name: make_model(name) for name in BLOCKS}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        write_self_contained(tmp_path / name)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-c", READER, tmp_path, *models], capture_output=True, text=True, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    for name, model in models.items():
        found = load_file(tmp_path / f"{name}.safetensors")
        assert torch.equal(found["logits"], model(tokens).logits), name
        assert torch.equal(found["generated"], model.generate(tokens, max_new_tokens=4, do_sample=False)), name
        assert torch.equal(found["hidden"], model.model(tokens).last_hidden_state), name
        # A model saved without the package is read with it.
        again = type(model).from_pretrained(tmp_path / f"{name}-again").eval()
        assert torch.equal(again(tokens).logits, model(tokens).logits), name


@torch.no_grad()
def test_carried_code_runs_beside_the_installed_package(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, tokens = make_model("everything"), torch.randint(50, (2, 9))
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "model")
    write_self_contained(tmp_path / "model")
    carried = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    assert torch.equal(carried(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, expected)
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert type(local) is GatedQwen3ForCausalLM


def test_code_holds_what_the_model_needs_and_no_more():
    dense, moe = generate_code("modeling_gated_qwen3"), generate_code("modeling_gated_qwen3_moe")
    assert "modeling_gated_qwen3.py" in dense
    assert "gated_attention_models_experts.py" in set(moe) - set(dense)
    for name, text in (dense | moe).items():
        compile(text, name, "exec")
        assert not re.search(r"^\s*(from|import) (gated_attention|jaxtyping)", text, flags=re.MULTILINE)
        assert 'custom_op("gated_attention::' not in text
    assert not any("penalty" in name or "reference" in name for name in moe)


def test_writing_twice_changes_nothing(tmp_path):
    make_model("headwise").save_pretrained(tmp_path)
    write_self_contained(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = write_self_contained(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert tmp_path / "modeling_gated_qwen3.py" in written
    assert json.loads(first["config.json"])["auto_map"]["AutoModel"] == "modeling_gated_qwen3.GatedQwen3Model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a configuration"),
        ("{", "cannot be read as a configuration"),
        ("[]", "cannot be read as a configuration"),
        ('{"model_type": "qwen3"}', "is of model_type 'qwen3'; code is carried for gated_qwen3 and gated_qwen3_moe"),
    ],
)
def test_other_folders_are_refused_and_left_alone(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_self_contained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["config.json"])
