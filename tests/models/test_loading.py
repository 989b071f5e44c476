"""A model is loaded whole or refused in one line that names a tensor and the cure, whoever asks for it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
)

from gated_attention.cli import main
from gated_attention.jobs.named_model import find_checkpoint, load_checkpoint
from gated_attention.models import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.build import build_model
from gated_attention.models.convert import convert
from gated_attention.models.saved.loading import load_model
from gated_attention.spec import GateSpec
from gated_attention.train.checkpoints import load_weights
from gated_attention.train.text.tokenizer import load_tokenizer

SIZES = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
ATTENTION = "model.layers.1.self_attn"
K_PROJ, GATE = f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.g_proj.weight"


def qwen3(folder, tied=False):
    config = Qwen3Config(**SIZES, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def change(folder, change_state):
    state = load_file(folder / "model.safetensors")
    change_state(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add(**tensors):
    return lambda at: change(at, lambda state: state.update(tensors))


def as_pickle(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state | {GATE: torch.zeros(4, 32)}, folder / "pytorch_model.bin")


def shard(folder):
    """Two files, the second of which holds another `k_proj` than the index names."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    last = {"model.norm.weight": state.pop("model.norm.weight"), K_PROJ: state[K_PROJ] + 1}
    save_file(state, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(last, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(last, "model-00002-of-00002.safetensors")
    weight_map |= dict.fromkeys(state, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def listed_outside(folder):
    shard(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"model-00001', '"../model-00001'))


FAULTS = {
    "a gate that the model lacks": (add(**{GATE: torch.zeros(4, 32)}), (GATE, "gated-attention convert")),
    "a gate in a pickle": (as_pickle, (GATE, "gated-attention convert")),
    "a layer too many": (add(**{"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}), ("model.layers.2.mlp",)),
    "a layer too few": (
        lambda at: configure(at, num_hidden_layers=3, layer_types=None),
        ("lacks 11 weights", "model.layers.2."),
    ),
    "no head": (
        lambda at: change(at, lambda state: state.pop("lm_head.weight")),
        ("lacks 1 weights", "lm_head.weight"),
    ),
    "another shape": (add(**{K_PROJ: torch.zeros(3, 32)}), (K_PROJ, "[3, 32]", "[16, 32]")),
    "integers": (add(**{K_PROJ: torch.zeros(16, 32, dtype=torch.int8)}), (K_PROJ, "int8")),
    "scales of a quantised model": (add(**{f"{K_PROJ}_scale": torch.ones(16)}), (f"{K_PROJ}_scale",)),
    "an unmerged adapter": (
        add(**{f"{ATTENTION}.q_proj.lora_A.default.weight": torch.zeros(2, 32)}),
        ("lora_A", "merge_and_unload"),
    ),
    "an adapter beside": (lambda at: (at / "adapter_config.json").write_text("{}"), ("adapter", "merge_and_unload")),
    "a tied head of its own": (lambda at: configure(at, tie_word_embeddings=True), ("tie_word_embeddings to false",)),
    "a tensor in two files": (shard, (K_PROJ, "model-00002-of-00002", "model-00001-of-00002")),
    "a file outside": (listed_outside, ("'../model-00001-of-00002.safetensors'", "outside")),
    "a file cut short": (
        lambda at: (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes()[:-50]),
        ("model.safetensors", "damaged"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_whole_model_is_refused(fault, tmp_path):
    harm, messages = FAULTS[fault]
    harm(qwen3(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_model(AutoModelForCausalLM, tmp_path / "model")
    for message in messages:
        assert message in str(error.value)


def rename_head(folder):
    change(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))


LEGITIMATE = {
    "a tied head left out": lambda at: None,
    "a tied head repeated": rename_head,
    "frequencies of old checkpoints": add(**{f"{ATTENTION}.rotary_emb.inv_freq": torch.ones(4)}),
}


@pytest.mark.parametrize("case", LEGITIMATE)
def test_what_old_checkpoints_repeat_or_leave_out_is_accepted(case, tmp_path):
    LEGITIMATE[case](qwen3(tmp_path / "model", tied=True))
    model = load_model(AutoModelForCausalLM, tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_stored_causal_masks_are_accepted(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    change(tmp_path, lambda state: state.update({"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}))
    load_model(AutoModelForCausalLM, tmp_path)


def test_a_classifier_is_no_language_model(tmp_path):
    config = Qwen3Config(**SIZES, tie_word_embeddings=True, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no place for tensor score\.weight"):
        load_model(AutoModelForCausalLM, tmp_path)


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}])
def test_a_study_starts_from_whole_checkpoints_only(experts, tmp_path):
    config = (GatedQwen3MoeConfig if experts else GatedQwen3Config)(**SIZES, **experts, gates=GateSpec())
    saved, started = build_model(config, 0), build_model(config, 1)
    saved.save_pretrained(tmp_path)
    load_weights(started, tmp_path)
    assert torch.equal(started.model.layers[1].self_attn.g_proj.weight, saved.model.layers[1].self_attn.g_proj.weight)
    configure(tmp_path, gates=[])
    with pytest.raises(ValueError, match=r"no place for tensor model\.layers\.0\.self_attn\.g_proj\.weight"):
        load_weights(build_model(type(config)(**SIZES, **experts), 0), tmp_path)


@pytest.mark.parametrize("command", ["evaluate", "analyze", "demo"])
def test_commands_refuse_a_gate_that_they_would_leave_out(command, tmp_path, capsys):
    change(qwen3(tmp_path / "model"), lambda state: state.update({GATE: torch.zeros(4, 32)}))
    (tmp_path / "text.txt").write_text("some text to read " * 200)
    data = [] if command == "demo" else ["--data", str(tmp_path / "text.txt"), "--context", "32"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([command, str(tmp_path / "model"), *data, "--device", "cpu", "--output", str(tmp_path / "out.png")])
    assert stop.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("error: ")
    assert f"no place for tensor {GATE}; gated-attention convert" in shown[-1]


def test_commands_refuse_weights_that_are_not_finite(tmp_path):
    change(qwen3(tmp_path), lambda state: state.update({K_PROJ: state[K_PROJ] * float("nan")}))
    with pytest.raises(ValueError, match=rf"tensor {K_PROJ} of .* not finite"):
        load_checkpoint(find_checkpoint(str(tmp_path)), torch.device("cpu"), "bytes")


def test_a_folder_of_shards_is_the_model_and_not_its_older_checkpoint(tmp_path):
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES))
    model.save_pretrained(tmp_path / "run", max_shard_size="20KB")
    old = qwen3(tmp_path / "run" / "checkpoint-5")
    (old / "trainer_state.json").write_text('{"global_step": 5}')
    assert find_checkpoint(str(tmp_path / "run")).path == str(tmp_path / "run")


def test_a_folder_with_an_adapter_only(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"PEFT adapter.*merge_and_unload"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=r"PEFT adapter.*merge_and_unload"):
        convert(tmp_path, tmp_path / "out")
