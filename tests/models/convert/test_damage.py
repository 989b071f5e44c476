"""Damaged input: one line that names tensor and file, exit code 2, and nothing where the model should be."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import STOCK, save, sizes, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from gated_attention.cli import main
from gated_attention.models.convert import convert


def assert_refused(folder, capfd, *messages):
    capfd.readouterr()  # of transformers, which wrote the source
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(folder), str(folder.parent / "out")])
    assert stop.value.code == 2
    captured = capfd.readouterr()
    for message in messages:
        assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def rewrite(folder, change):
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


class Runs:
    def __reduce__(self):
        return print, ("ran",)


PICKLE = "pytorch_model.bin"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "missing tensor": (lambda at: rewrite(at, lambda state: state.pop(K_PROJ)), (K_PROJ, "missing")),
    "missing packed tensor": (lambda at: rewrite(at, lambda state: state.pop(Q_PROJ)), (Q_PROJ, "missing")),
    "wrong shape": (
        lambda at: rewrite(at, lambda state: state.update({K_PROJ: torch.zeros(3, 3)})),
        (K_PROJ, "[3, 3]"),
    ),
    "wrong packed shape": (
        lambda at: rewrite(at, lambda state: state.update({Q_PROJ: state[Q_PROJ][:-1]})),
        (Q_PROJ, "[95, 32]", "[96, 32], queries and gate"),
    ),
    "unknown key": (lambda at: rewrite(at, lambda state: state.update(extra=torch.zeros(1))), ("tensor extra",)),
    "integers": (
        lambda at: rewrite(at, lambda state: state.update({K_PROJ: torch.zeros(3, dtype=torch.int8)})),
        (K_PROJ, "int8"),
    ),
    "not tensors": (lambda at: rewrite(at, lambda state: state.update(step=3)), ("not a mapping of names to tensors",)),
    "truncated": (lambda at: cut(at / PICKLE, 5000), ("is damaged (cut short)",)),
    "truncated at the end": (lambda at: cut(at / PICKLE, -1), ("is damaged (cut short)",)),
    "a pointer": (lambda at: (at / PICKLE).write_text("version https://git-lfs.github.com/spec/v1"), ("git lfs pull",)),
    "empty": (lambda at: cut(at / PICKLE, 0), ("is damaged",)),
    "a text": (lambda at: (at / PICKLE).write_text("hello"), ("is damaged",)),
    "code": (lambda at: (at / PICKLE).write_bytes(pickle.dumps(Runs(), 2)), ("asks for ", "print", "is refused")),
    "code of another protocol": (lambda at: (at / PICKLE).write_bytes(pickle.dumps(Runs(), 4)), ("is refused",)),
    "code in an archive": (lambda at: torch.save({"a": Runs()}, at / PICKLE), ("asks for ", "print", "is refused")),
}
CONFIGS = {
    "bias": ({"qkv_bias": True}, "qkv_bias"),
    "no norm": ({"use_qk_norm": False}, "use_qk_norm"),
    "no flag": ({"headwise_attn_output_gate": "absent"}, "without headwise_attn_output_gate"),
    "no flags": (
        {"headwise_attn_output_gate": "absent", "elementwise_attn_output_gate": "absent"},
        "not the paper's release",
    ),
    "both gates": ({"headwise_attn_output_gate": True}, "both true"),
    "unknown architecture": ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    "no architecture": ({"model_type": "absent"}, "model_type 'None'"),
    "architecture of another type": ({"model_type": ["qwen3"]}, "is not readable"),
    "vision": ({"vision_config": {}}, "vision"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "a size in words": ({"hidden_size": "wide"}, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "num_heads is 0"),
    "unequal groups": ({"num_key_value_heads": 3}, "not a multiple"),
    "another width": ({"hidden_size": 16}, "[96, 16], queries and gate"),
    "another FFN": ({"intermediate_size": 40}, "model.layers.0.mlp.gate_proj.weight"),
    "unknown activation": ({"hidden_act": "sine"}, "sine"),
    "negative size": ({"intermediate_size": -1}, "describes no model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights(damage, tmp_path, capfd):
    harm, messages = DAMAGE[damage]
    write_release(tmp_path / "source", "elementwise")
    harm(tmp_path / "source")
    assert_refused(tmp_path / "source", capfd, str(tmp_path / "source" / PICKLE), *messages)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_not_read(name, tmp_path, capfd):
    changes, message = CONFIGS[name]
    write_release(tmp_path / "source", "elementwise", **changes)
    assert_refused(tmp_path / "source", capfd, message, str(tmp_path / "source"))


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\x80"])
def test_configurations_that_are_no_objects(text, tmp_path, capfd):
    write_release(tmp_path / "source", "elementwise")
    path = tmp_path / "source" / "config.json"
    path.unlink() if text is None else path.write_text(text, encoding="latin-1")
    assert_refused(tmp_path / "source", capfd, str(path))


def test_a_folder_without_weights(tmp_path, capfd):
    write_release(tmp_path / "source", "elementwise")
    (tmp_path / "source" / PICKLE).unlink()
    assert_refused(tmp_path / "source", capfd, "holds no weights")


@pytest.fixture
def sharded(tmp_path):
    """A plain Qwen3 in several files of safetensors."""
    save(Qwen3Config(**sizes()), tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "source", max_shard_size="40KB")
    for path in (tmp_path / "one").iterdir():
        path.unlink()
    (tmp_path / "one").rmdir()
    return tmp_path / "source"


def file_of(folder, tensor):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def test_a_truncated_shard(sharded, capfd):
    cut(file_of(sharded, K_PROJ), -100)
    assert_refused(sharded, capfd, f"{file_of(sharded, K_PROJ)} is damaged")


def test_a_shard_that_is_not_there(sharded, capfd):
    file_of(sharded, K_PROJ).unlink()
    assert_refused(sharded, capfd, f"{file_of(sharded, K_PROJ)} is missing")


def test_a_tensor_that_its_shard_does_not_hold(sharded, capfd):
    path = file_of(sharded, K_PROJ)
    state = load_file(path)
    del state[K_PROJ]
    save_file(state, path)
    assert_refused(sharded, capfd, f"tensor {K_PROJ} is missing from {path}")


def test_a_tensor_of_the_wrong_shape_in_a_shard(sharded, capfd):
    path = file_of(sharded, K_PROJ)
    save_file(load_file(path) | {K_PROJ: torch.zeros(3, 3)}, path)
    assert_refused(sharded, capfd, f"tensor {K_PROJ} of {path} has shape [3, 3]")


@pytest.mark.parametrize("outside", ["../{}", "/{}", "sub/../../{}", ""])
def test_an_index_that_leaves_its_folder(outside, sharded, capfd):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][K_PROJ] = listed = outside.format(index["weight_map"][K_PROJ])
    path.write_text(json.dumps(index))
    assert_refused(sharded, capfd, f"{path} lists {listed!r}, which is outside its folder")


def test_a_tensor_that_the_index_does_not_list(sharded, capfd):
    path = file_of(sharded, K_PROJ)
    save_file(load_file(path) | {"model.extra": torch.zeros(1)}, path)
    assert_refused(sharded, capfd, f"tensor model.extra of {path} is not in model.safetensors.index.json")


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}])
def test_an_index_that_maps_nothing(weight_map, sharded, capfd):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(sharded, capfd, "model.safetensors.index.json has no weight_map")


STOCK_FAULTS = {
    "linear attention": ({"layer_types": ["linear_attention", "full_attention"]}, "linear attention"),
    "partial rotation": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "partial_rotary_factor"),
    "bias": ({"attention_bias": True}, "attention_bias"),
    "another gate": ({"gated_attention": {"granularity": "headwise"}}, "not headwise"),
    "unknown gate": ({"gated_attention": {"granularity": "rowwise"}}, "rowwise"),
}


@pytest.mark.parametrize("fault", STOCK_FAULTS)
def test_stock_checkpoints_that_have_no_place_here(fault, tmp_path, capfd):
    changes, message = STOCK_FAULTS[fault]
    save(STOCK["qwen3_next"](), tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_refused(tmp_path / "source", capfd, message)


def test_shared_experts_that_add_something(tmp_path, capfd):
    save(STOCK["qwen3_next"](moe=True), tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    save_file(load_file(path) | {name: torch.ones(32, 1)}, path)
    assert_refused(tmp_path / "source", capfd, f"tensor {name} of {path} is a shared expert")


def test_a_tied_head_that_differs(tmp_path, capfd):
    write_release(tmp_path / "source", "headwise", tie_word_embeddings=True)
    assert_refused(tmp_path / "source", capfd, "lm_head.weight", "tie_word_embeddings")


def test_a_target_that_cannot_be_written(tmp_path):
    write_release(tmp_path / "source", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out cannot be written"):
        convert(tmp_path / "source", tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(tmp_path / "source", tmp_path / "source")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(tmp_path / "source", tmp_path / "file")


STOPPED_AFTER_A_SHARD = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from gated_attention.models.convert import storage
from gated_attention.cli import main

save = storage.save_file

def save_and_stop(tensors, path, metadata):
    save(tensors, path, metadata=metadata)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))

storage.save_file = save_and_stop
main(["convert", *sys.argv[2:], "--max-shard-size", "20KB"])
"""


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGKILL", marks=pytest.mark.trust)])
def test_a_stop_half_way_leaves_nothing_that_looks_whole(name, tmp_path):
    source = save(Qwen3Config(**sizes()), tmp_path / "source")
    target = tmp_path / "target" / "out"
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED_AFTER_A_SHARD, name, source, target], capture_output=True, text=True, check=False
    )
    left = [path.name for path in target.parent.iterdir()]
    if name == "SIGINT":
        assert (stopped.returncode, stopped.stderr.splitlines()[-1]) == (130, "stopped")
        assert left == []
    else:
        assert stopped.returncode == -signal.SIGKILL
        assert [path.startswith(".part-") for path in left] == [True]
        with pytest.raises(OSError, match="no file named"):
            AutoModelForCausalLM.from_pretrained(target.parent / left[0])
    done = convert(source, target)
    assert sorted(os.listdir(target)) == list(done.files)
    assert os.listdir(target.parent) == ["out"]  # what was killed is removed
