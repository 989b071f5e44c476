import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb

from gated_attention.cli import main
from gated_attention.models import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.convert import convert
from gated_attention.spec import GateSpec

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
HEADS, LAYERS, DIM = 4, 2, 12


def sizes(num_kv_heads=2):
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": num_kv_heads,
        "head_dim": DIM,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}


def random_model(config):
    """A model whose every weight is random and large enough that a wrong one shows."""
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            start = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.3 * start if name.endswith("norm.weight") else 0.3 * start)
    return model


def save(config, folder):
    random_model(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def next_config(num_kv_heads=2):
    values = sizes(num_kv_heads)
    values["rope_parameters"]["partial_rotary_factor"] = 1.0
    return Qwen3NextConfig(
        **values, layer_types=["full_attention"] * LAYERS, num_experts=0, mlp_only_layers=list(range(LAYERS))
    )


def qwen3_5_config(num_kv_heads=2, moe=False):
    values = sizes(num_kv_heads)
    values["rope_parameters"] |= {
        "partial_rotary_factor": 1.0,
        "mrope_section": [2, 2, 2],
        "mrope_interleaved": True,
    }
    values |= {"layer_types": ["full_attention"] * LAYERS}
    if moe:
        return Qwen3_5MoeTextConfig(**values, **EXPERTS, shared_expert_intermediate_size=1)
    return Qwen3_5TextConfig(**values)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("make", [next_config, qwen3_5_config])
def test_stock_layouts_come_in_and_go_back(make, num_kv_heads, tmp_path):
    source = save(make(num_kv_heads), tmp_path / "source")
    convert(source, tmp_path / "gated")
    convert(tmp_path / "gated", tmp_path / "back", "qwen3_next" if make is next_config else "qwen3_5")
    expected = logits(source)
    assert (logits(tmp_path / "gated") - expected).abs().max() <= 1e-5
    assert (logits(tmp_path / "back") - expected).abs().max() <= 1e-6
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_weights(tmp_path / "gated", tmp_path / "again")


@pytest.mark.parametrize("to", ["qwen3_next", "qwen3_5"])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@pytest.mark.parametrize("moe", [False, True])
def test_export_keeps_logits_and_comes_back(to, granularity, moe, tmp_path):
    gate = GateSpec(granularity=granularity, dtype="model")
    values = sizes() | (EXPERTS if moe else {})
    source = save((GatedQwen3MoeConfig if moe else GatedQwen3Config)(**values, gates=gate), tmp_path / "source")
    convert(source, tmp_path / "out", to)
    assert (logits(tmp_path / "out") - logits(source)).abs().max() <= (
        1e-6 if granularity == "elementwise" and not moe else 1e-5
    )
    convert(tmp_path / "out", tmp_path / "back")
    assert_same_weights(source, tmp_path / "back")


def test_bfloat16_round_trip_is_bit_identical(tmp_path):
    model = random_model(GatedQwen3Config(**sizes(), gates=GateSpec(dtype="model"))).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "out", "qwen3_next")
    assert done.widened > 0
    assert (logits(tmp_path / "out") - logits(tmp_path / "source")).abs().max() <= 1e-6
    convert(tmp_path / "out", tmp_path / "back")
    assert_same_weights(tmp_path / "source", tmp_path / "back")


def write_release(folder, granularity, num_kv_heads, **changes):
    """The paper's release, packed by its definition: per key/value group, its queries and then its gates."""
    gates = GateSpec(granularity=granularity, dtype="model") if granularity else ()
    model = random_model(GatedQwen3Config(**sizes(num_kv_heads), gates=gates))
    state = dict(model.state_dict())
    group = HEADS // num_kv_heads
    for layer in range(LAYERS if granularity else 0):
        prefix = f"model.layers.{layer}.self_attn."
        q, g = state[prefix + "q_proj.weight"], state.pop(prefix + "g_proj.weight")
        rows = len(g) // HEADS
        packed = []
        for first in range(0, HEADS, group):
            packed += [q[DIM * first : DIM * (first + group)], g[rows * first : rows * (first + group)]]
        state[prefix + "q_proj.weight"] = torch.cat(packed)
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    config = {key: value for key, value in sizes(num_kv_heads).items() if key != "rope_parameters"}
    config |= {
        "model_type": "qwen2",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "use_qk_norm": True,
        "qkv_bias": False,
        "headwise_attn_output_gate": granularity == "headwise",
        "elementwise_attn_output_gate": granularity == "elementwise",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_qwen3.py").write_text("")
    return model


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise", None])
@torch.no_grad()
def test_the_release_converts(granularity, num_kv_heads, tmp_path):
    model = write_release(tmp_path / "source", granularity, num_kv_heads)
    done = convert(tmp_path / "source", tmp_path / "gated", max_shard_bytes=10_000)
    assert (logits(tmp_path / "gated") - model(IDS).logits).abs().max() <= 1e-5
    assert "tokenizer.json" in done.files
    assert "modeling_qwen3.py" not in done.files
    assert "model.safetensors.index.json" in done.files


def test_pickles_of_old_pytorch_are_read(tmp_path):
    write_release(tmp_path / "source", "headwise", 2)
    convert(tmp_path / "source", tmp_path / "new")
    path = tmp_path / "source" / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    convert(tmp_path / "source", tmp_path / "old")
    assert_same_weights(tmp_path / "new", tmp_path / "old")


class ReleaseAttention(Qwen3Attention):
    """The release's attention from its definition: the rows of each key/value group are its queries, then its gates."""

    gate_rows = DIM

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        heads, gates = config.num_attention_heads, config.num_attention_heads * self.gate_rows
        self.q_proj = torch.nn.Linear(config.hidden_size, heads * DIM + gates, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        B, T, _ = hidden_states.shape
        group = self.num_key_value_groups
        rows = self.q_proj(hidden_states).view(B, T, HEADS // group, -1)
        q, gate = rows.split([group * DIM, group * self.gate_rows], dim=-1)
        q = self.q_norm(q.reshape(B, T, HEADS, DIM)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(B, T, -1, DIM)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(B, T, -1, DIM).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~torch.ones(T, T).bool().tril(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2)  # (B, T, H, D)
        y = y * torch.sigmoid(gate.reshape(B, T, HEADS, self.gate_rows))
        return self.o_proj(y.reshape(B, T, HEADS * DIM)), None


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@torch.no_grad()
def test_the_release_computes_what_its_own_forward_does(granularity, num_kv_heads, tmp_path, monkeypatch):
    write_release(tmp_path / "source", granularity, num_kv_heads)
    monkeypatch.setattr(ReleaseAttention, "gate_rows", 1 if granularity == "headwise" else DIM)
    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.Qwen3Attention", ReleaseAttention)
    release = Qwen3ForCausalLM(Qwen3Config(**sizes(num_kv_heads))).eval()
    release.load_state_dict(torch.load(tmp_path / "source" / "pytorch_model.bin", weights_only=True))
    convert(tmp_path / "source", tmp_path / "gated")
    assert (logits(tmp_path / "gated") - release(IDS).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_a_wrong_layout_differs(tmp_path, monkeypatch):
    from gated_attention.models.convert import read

    model = write_release(tmp_path / "source", "elementwise", 2)
    monkeypatch.setattr(read, "split_per_group", lambda packed, geometry, rows: read.split_per_head(packed, geometry))
    convert(tmp_path / "source", tmp_path / "gated")
    assert (logits(tmp_path / "gated") - model(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("moe", [False, True])
def test_a_gate_is_added_and_changes_nothing_at_first(moe, tmp_path):
    config = Qwen3MoeConfig(**sizes(), **EXPERTS) if moe else Qwen3Config(**sizes())
    source = save(config, tmp_path / "source")
    done = convert(source, tmp_path / "gated", add_gate=[GateSpec(granularity="headwise")])
    assert torch.equal(logits(tmp_path / "gated"), logits(source))
    assert done.gates[0].scale == 2.0
    assert "neither removes" in done.warning
    convert(source, tmp_path / "normal", add_gate=[GateSpec()], init="normal")
    assert not torch.equal(logits(tmp_path / "normal"), logits(source))


@pytest.mark.parametrize(
    ("name", "granularity"), [("w_g", "elementwise"), ("gate_proj", "elementwise"), ("g_proj", "headwise")]
)
@torch.no_grad()
def test_separate_gates_are_known_by_their_names(name, granularity, tmp_path):
    model = random_model(GatedQwen3Config(**sizes(), gates=GateSpec(granularity=granularity, dtype="model")))
    state = {key.replace(".g_proj.", f".{name}."): value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes()}))
    convert(tmp_path / "source", tmp_path / "gated")
    assert torch.equal(logits(tmp_path / "gated"), model(IDS).logits)


@torch.no_grad()
def test_fused_experts_are_split(tmp_path):
    model = random_model(GatedQwen3MoeConfig(**sizes(), **EXPERTS))
    (tmp_path / "source").mkdir()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **sizes(), **EXPERTS}))
    convert(tmp_path / "source", tmp_path / "gated")
    assert torch.equal(logits(tmp_path / "gated"), model(IDS).logits)


@pytest.mark.parametrize(
    "gate",
    [
        GateSpec("value"),
        GateSpec(activation="silu"),
        GateSpec(combine="add"),
        GateSpec(scale=2.0),
        GateSpec(head_shared=True),
        GateSpec(bias=0.0),
        GateSpec(input_dim=4),
        (),
    ],
)
def test_what_stock_classes_cannot_express_is_refused(gate, tmp_path):
    source = save(GatedQwen3Config(**sizes(), gates=gate), tmp_path / "source")
    with pytest.raises(ValueError, match="--to gated"):
        convert(source, tmp_path / "out", "qwen3_next")
    assert not (tmp_path / "out").exists()


def rewrite(folder, change):
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


class Runs:
    def __reduce__(self):
        return print, ("ran",)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
DAMAGE = {
    "missing tensor": (lambda folder: rewrite(folder, lambda state: state.pop(K_PROJ)), K_PROJ),
    "wrong shape": (lambda folder: rewrite(folder, lambda state: state.update({K_PROJ: torch.zeros(3, 3)})), K_PROJ),
    "unknown key": (lambda folder: rewrite(folder, lambda state: state.update(extra=torch.zeros(1))), "extra"),
    "truncated": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:5000]),
        "pytorch_model.bin is damaged",
    ),
    "code": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs())),
        "pytorch_model.bin asks for more than tensors",
    ),
    "no weights": (lambda folder: (folder / "pytorch_model.bin").unlink(), "holds no weights"),
}
CONFIGS = {
    "bias": ({"qkv_bias": True}, "qkv_bias"),
    "no norm": ({"use_qk_norm": False}, "use_qk_norm"),
    "unknown architecture": ({"model_type": "gpt2"}, "gpt2"),
    "both gates": ({"headwise_attn_output_gate": True}, "both true"),
    "vision": ({"vision_config": {}}, "vision"),
}


def assert_refused(folder, message, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(folder), str(folder.parent / "out")])
    assert stop.value.code == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "ran" not in captured.out
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_leave_nothing(damage, tmp_path, capfd):
    harm, message = DAMAGE[damage]
    write_release(tmp_path / "source", "elementwise", 2)
    harm(tmp_path / "source")
    capfd.readouterr()  # of transformers, which wrote the source
    assert_refused(tmp_path / "source", message, capfd)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_not_read(name, tmp_path, capfd):
    changes, message = CONFIGS[name]
    write_release(tmp_path / "source", "elementwise", 2, **changes)
    assert_refused(tmp_path / "source", message, capfd)


def test_a_qwen2_without_flags_is_refused(tmp_path, capfd):
    write_release(tmp_path / "source", "elementwise", 2)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "gate" not in k}))
    assert_refused(tmp_path / "source", "headwise_attn_output_gate", capfd)


def test_a_truncated_safetensors_shard_is_named(tmp_path, capfd):
    save(Qwen3Config(**sizes()), tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    capfd.readouterr()  # of transformers, which wrote the source
    assert_refused(tmp_path / "source", "model.safetensors is damaged", capfd)


def test_a_stop_half_way_leaves_nothing(tmp_path, monkeypatch):
    from gated_attention.models.convert import storage

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    source = save(Qwen3Config(**sizes()), tmp_path / "source")
    monkeypatch.setattr(storage, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_folders_inside_hub_repositories(tmp_path, monkeypatch, capsys):
    write_release(tmp_path / "1B_gate_headwise", "headwise", 2)
    asked = []

    def download(name, **patterns):
        asked.append((name, patterns["allow_patterns"][0]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    main_ok(["convert", "owner/repository/1B_gate_headwise", str(tmp_path / "out")])
    assert asked == [("owner/repository", "1B_gate_headwise/*.json")]
    assert "the paper's release, headwise -> gated_qwen3: G1 sdpa headwise" in capsys.readouterr().out


def main_ok(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0


def test_a_target_with_files_is_refused(tmp_path):
    write_release(tmp_path / "source", None, 2)
    with pytest.raises(ValueError, match="not empty"):
        convert(tmp_path / "source", tmp_path / "source")


def test_the_folder_carries_a_card_and_its_code(tmp_path):
    write_release(tmp_path / "source", "headwise", 2)
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# theirs\n")
    done = convert(tmp_path / "source", tmp_path / "gated", self_contained=True)
    card = (tmp_path / "gated" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "trust_remote_code=True" in card
    assert "# gated" in card
    assert "modeling_gated_qwen3.py" in done.files
    with pytest.raises(ValueError, match="transformers itself"):
        convert(tmp_path / "source", tmp_path / "next", "qwen3_next", self_contained=True)


def test_log_sum_exp_gates_are_not_neutral(tmp_path):
    source = save(Qwen3Config(**sizes()), tmp_path / "source")
    with pytest.raises(ValueError, match="changes the model"):
        convert(source, tmp_path / "out", add_gate=GateSpec(granularity="headwise", input="lse"))


@pytest.mark.parametrize(
    ("block", "field"), [({"sandwich_norm": True}, "sandwich_norm"), ({"output_clip": 3.0}, "output_clip")]
)
def test_stock_classes_have_plain_blocks(block, field, tmp_path):
    source = save(GatedQwen3Config(**sizes(), gates=GateSpec(), **block), tmp_path / "source")
    with pytest.raises(ValueError, match=f"cannot express {field}"):
        convert(source, tmp_path / "out", "qwen3_next")
