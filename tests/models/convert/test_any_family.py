"""Gates that `convert` adds to models of other families: the old bits, in a folder that loads, or one line."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers as tf
from family_models import make_model, output
from safetensors.torch import load_file, save_file

from gated_attention.cli import main
from gated_attention.models import add_gates, gated, remove_gates
from gated_attention.models.convert import convert
from gated_attention.models.convert.any_family import parse_layers
from gated_attention.spec import GateSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says of small models

HEADWISE = GateSpec(granularity="headwise")
AUTO = {
    "llama": tf.AutoModelForCausalLM,
    "gemma3": tf.AutoModelForCausalLM,
    "gpt2": tf.AutoModelForCausalLM,
    "qwen2": tf.AutoModelForCausalLM,
    "mixtral": tf.AutoModelForCausalLM,
    "bert": tf.AutoModelForMaskedLM,
    "vit": tf.AutoModelForImageClassification,
    "whisper": tf.AutoModelForSpeechSeq2Seq,
}


def save(name, folder, **overrides):
    make_model(name, **overrides).save_pretrained(folder)
    return folder


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, arguments)])
    return stop.value.code


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", AUTO)
def test_added_gates_change_no_bit(name, tmp_path):
    source = save(name, tmp_path / "source")
    done = convert(source, tmp_path / "gated", add_gate=[GateSpec(), GateSpec("value", "headwise")])
    model = AUTO[name].from_pretrained(tmp_path / "gated").eval()
    assert type(model).__name__ == f"Gated{done.origin}"
    assert done.became == model.config.model_type == f"gated_{make_model(name).config.model_type}"
    assert torch.equal(output(name, model), output(name, make_model(name)))
    assert done.num_parameters == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_conversions_give_the_same_bytes_in_the_dtype_of_the_source(dtype, tmp_path):
    make_model("llama").to(dtype).save_pretrained(tmp_path / "source")
    for number in range(2):
        torch.manual_seed(number)
        convert(tmp_path / "source", tmp_path / str(number), add_gate=HEADWISE, init="normal", max_shard_bytes=30_000)
    names = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert "model-00002-of-00003.safetensors" in names or "model-00002-of-00002.safetensors" in names
    for name in names:
        one, other = ((tmp_path / number / name).read_bytes() for number in "01")
        assert one.replace(b"# 0", b"# 1").replace(b'("0")', b'("1")') == other, name
    stored = [load_file(path) for path in sorted((tmp_path / "0").glob("*.safetensors"))]
    tensors = {name: tensor for part in stored for name, tensor in part.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    few = convert(tmp_path / "source", tmp_path / "few", add_gate=HEADWISE, init="normal", layers=[1])
    gate = "model.layers.1.self_attn.g_proj.weight"
    assert torch.equal(load_file(few.folder / "model.safetensors")[gate], tensors[gate])
    assert tensors[gate].float().std() == pytest.approx(0.02, rel=0.2)


def test_a_bias_is_what_the_spec_says(tmp_path):
    source = save("llama", tmp_path / "source")
    convert(source, tmp_path / "gated", add_gate=GateSpec(granularity="headwise", bias=3.0), init="normal")
    biases = {k: v for k, v in load_file(tmp_path / "gated/model.safetensors").items() if k.endswith("g_proj.bias")}
    assert len(biases) == 2
    assert all(torch.equal(bias, torch.full((4,), 3.0)) for bias in biases.values())


def test_names_without_the_prefix_of_a_model_load(tmp_path):
    """GPT-2 lies on the hub as `wte.weight`, not `transformer.wte.weight`."""
    source = save("gpt2", tmp_path / "source")
    path = source / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    convert(source, tmp_path / "gated", add_gate=HEADWISE, init="normal")
    model, info = gated(tf.GPT2LMHeadModel).from_pretrained(tmp_path / "gated", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.transformer.h[0].attn.g_proj.weight.detach().std() == pytest.approx(0.02, rel=0.3)


def test_the_command_gates_the_layers_asked_for(tmp_path, capsys):
    types = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    source = save("gemma3", tmp_path / "gemma", **types)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("---\nlicense: gemma\nbase_model: google/gemma\n---\n# Gemma\n")
    capsys.readouterr()
    target = tmp_path / "full"
    assert command(source, target, "--add-gate", "sdpa-headwise", "--layers", "full_attention") == 0
    out, error = capsys.readouterr()
    assert (
        "Gemma3ForCausalLM -> gated_gemma3_text: G1 sdpa headwise 2*sigmoid zero init, in the attention of layers 1, 3"
    ) in out
    assert "gated-attention adapt adds gates and trains them" in out
    assert error == ""
    assert (target / "tokenizer.json").read_text() == "{}"
    card = (target / "README.md").read_text()
    assert "\nlicense: gemma\n" in card
    assert "\nbase_model: google/gemma\n" in card
    assert "| Where | attention of layers 1, 3 |" in card
    assert f'gated(Gemma3ForCausalLM).from_pretrained("{target.name}")' in card
    source = save("whisper", tmp_path / "whisper")
    target = tmp_path / "cross"
    assert command(source, target, "--add-gate", "sdpa-headwise", "--layers", "0-1", "--attention", "cross") == 0
    gates = {name for name in load_file(target / "model.safetensors") if "g_proj" in name}
    assert gates == {f"model.decoder.layers.{layer}.encoder_attn.g_proj.weight" for layer in range(2)}
    assert "in the cross-attention of layers 0-1" in capsys.readouterr().out


def test_layers_as_people_write_them():
    assert parse_layers(None) is None
    assert parse_layers("0-3, 7") == [0, 1, 2, 3, 7]
    assert parse_layers("full_attention") == "full_attention"
    for text in ("", "3-0", "-1", "0,,1", "1-x", "1-2-3"):
        with pytest.raises(ValueError, match="give indices"):
            parse_layers(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model_type 'llama' of"),
        (["--add-gate", "sdpa-headwise", "--to", "qwen3_next"], "this is a llama; leave out --to"),
        (["--add-gate", "sdpa-headwise", "--self-contained"], "leave out --self-contained"),
        (["--add-gate", "sdpa-headwise", "--layers", "9"], "no attention in layer 9; choose from 0, 1"),
        (["--add-gate", "sdpa-headwise", "--layers", "full_attention"], "this model has none; give indices"),
        (["--add-gate", "sdpa-headwise", "--layers", "3-0"], "--layers is '3-0'"),
        (["--add-gate", "sdpa-headwise", "--attention", "cross"], "no cross-attention"),
        (["--add-gate", "learned-sink", "--init", "normal"], "log-sum-exp"),
        (["--add-gate", "sdpa-headwise-open", "--attention", "most"], "'most' is not one of"),
        (["--add-gate", "switch-v-8-top-2"], "choose one that is gates and nothing else"),
        (["--layers", "0"], "name the gates with add_gate"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path, capfd):
    source = save("llama", tmp_path / "source")
    capfd.readouterr()
    assert command(source, tmp_path / "out", *arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


CHANGES = {
    "gates already": ({"model_type": "gated_llama"}, "has gates already"),
    "code of its own": ({"architectures": ["MyLlama"]}, "the architecture 'MyLlama', which transformers does not have"),
    "no architecture": ({"architectures": None}, "the architecture None"),
    "another type": (
        {"architectures": ["MistralForCausalLM"]},
        "'llama' and architecture MistralForCausalLM, which is",
    ),
    "quantised": ({"quantization_config": {}}, "give the checkpoint that was quantised"),
    "more layers": ({"num_hidden_layers": 3}, "lacks 9 weights of its model"),
    "other shapes": ({"intermediate_size": 40}, "has shape"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_folders_that_do_not_fit_are_refused(case, tmp_path):
    changes, message = CHANGES[case]
    source = save("llama", tmp_path / "source")
    edit_config(source, **changes)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", add_gate=HEADWISE)
    assert os.listdir(tmp_path) == ["source"]


def test_a_family_with_attention_of_its_own_and_a_qwen3_by_layers_are_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 61}
    tf.FalconForCausalLM(tf.FalconConfig(**sizes)).save_pretrained(tmp_path / "falcon")
    with pytest.raises(ValueError, match="computes attention of its own"):
        convert(tmp_path / "falcon", tmp_path / "out", add_gate=HEADWISE)
    with pytest.raises(ValueError, match="a Qwen3 gets gates in all its layers"):
        convert(save("qwen3", tmp_path / "qwen3"), tmp_path / "out", add_gate=HEADWISE, layers=[0])
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from gated_attention.models.convert import convert as package
from importlib import import_module
module = import_module("gated_attention.models.convert.convert")
module.write_checkpoint = lambda *_: (print("writing", flush=True), time.sleep(60))
from gated_attention.cli import main
main(["convert", sys.argv[1], sys.argv[2], "--add-gate", "sdpa-headwise"])
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_killed_leaves_no_folder(kind, tmp_path):
    source = save("llama", tmp_path / "source")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, source, tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(kind)
    process.communicate()
    assert not (tmp_path / "out").exists()
    if kind == signal.SIGTERM:
        assert os.listdir(tmp_path) == ["source"]
    convert(source, tmp_path / "out", add_gate=HEADWISE)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_loaded_model_has_the_type_of_its_class(tmp_path):
    model = add_gates(tf.LlamaForCausalLM.from_pretrained(save("llama", tmp_path / "plain")))
    assert model.config.model_type == "gated_llama"
    model.save_pretrained(tmp_path / "gated")
    model = remove_gates(gated(tf.LlamaForCausalLM).from_pretrained(tmp_path / "gated"))
    assert model.config.model_type == "llama"
    assert isinstance(add_gates(model), tf.LlamaForCausalLM)


@pytest.mark.parametrize("content", ["{}", '{"model_type": 3}'])
@pytest.mark.parametrize("options", [[], ["--to", "qwen3_next"], ["--self-contained"]])
def test_a_configuration_without_a_type_is_named(tmp_path, capsys, content, options):
    (tmp_path / "config.json").write_text(content)
    assert command(tmp_path, tmp_path / "target", "--add-gate", "sdpa-headwise", *options) == 2
    assert f"{tmp_path / 'config.json'} names no model_type; fetch it again" in capsys.readouterr().err
