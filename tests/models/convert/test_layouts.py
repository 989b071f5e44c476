"""Every layout in: logits are those of a forward pass that knows the layout, and a wrong layout shows."""

import json

import pytest
import torch
from checkpoints import (
    DIM,
    EXPERTS,
    HEADS,
    IDS,
    LAYERS,
    STOCK,
    distance,
    logits,
    random_model,
    read_config,
    save,
    sizes,
    write_release,
)
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb

from gated_attention.models import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.convert import convert, read
from gated_attention.spec import GateSpec

GROUPS = pytest.mark.parametrize("num_kv_heads", [4, 2, 1])


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
        if self.gate_rows:
            y = y * torch.sigmoid(gate.reshape(B, T, HEADS, self.gate_rows))
        return self.o_proj(y.reshape(B, T, HEADS * DIM)), None


@GROUPS
@pytest.mark.parametrize(("granularity", "gate_rows"), [("headwise", 1), ("elementwise", DIM), (None, 0)])
@torch.no_grad()
def test_the_release_computes_what_its_own_forward_does(granularity, gate_rows, num_kv_heads, tmp_path, monkeypatch):
    write_release(tmp_path / "source", granularity, num_kv_heads)
    monkeypatch.setattr(ReleaseAttention, "gate_rows", gate_rows)
    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.Qwen3Attention", ReleaseAttention)
    release = Qwen3ForCausalLM(Qwen3Config(**sizes(num_kv_heads))).eval()
    release.load_state_dict(torch.load(tmp_path / "source" / "pytorch_model.bin", weights_only=True))
    convert(tmp_path / "source", tmp_path / "gated")
    assert distance(logits(tmp_path / "gated"), release(IDS).logits) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "default"}},
        {"head_dim": DIM, "use_qk_norm": "absent", "qkv_bias": "absent"},
        {"sliding_window": None, "attention_bias": False, "max_window_layers": 2},
        {"intermediate_size": 48, "tie_word_embeddings": False, "transformers_version": "4.46.0"},
    ],
)
@torch.no_grad()
def test_quirks_of_the_releases_configuration(changes, tmp_path):
    model = write_release(tmp_path / "source", "elementwise", **changes)
    convert(tmp_path / "source", tmp_path / "gated")
    assert distance(logits(tmp_path / "gated"), model(IDS).logits) <= 1e-5


@torch.no_grad()
def test_a_tied_head_that_a_pickle_shares_is_dropped(tmp_path):
    write_release(tmp_path / "source", "headwise", tie_word_embeddings=True)
    path = tmp_path / "source" / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, path)
    convert(tmp_path / "source", tmp_path / "gated")
    torch.save({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, path)
    convert(tmp_path / "source", tmp_path / "again")
    assert torch.equal(logits(tmp_path / "gated"), logits(tmp_path / "again"))


@GROUPS
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("name", STOCK)
def test_stock_architectures_compute_the_same(name, moe, num_kv_heads, tmp_path):
    source = save(STOCK[name](num_kv_heads, moe), tmp_path / "source")
    convert(source, tmp_path / "gated")
    assert distance(logits(tmp_path / "gated"), logits(source)) <= 1e-5


@GROUPS
@pytest.mark.parametrize("moe", [False, True])
def test_models_without_a_gate_stay_what_they_are(moe, num_kv_heads, tmp_path):
    config = Qwen3MoeConfig(**sizes(num_kv_heads), **EXPERTS) if moe else Qwen3Config(**sizes(num_kv_heads))
    source = save(config, tmp_path / "source")
    done = convert(source, tmp_path / "gated")
    assert torch.equal(logits(tmp_path / "gated"), logits(source))
    assert done.gates == ()


def write_separate(folder, model, name, model_type):
    """The model's weights under another name of the gate, beside a configuration that knows of none."""
    folder.mkdir()
    state = {key.replace(".g_proj.", f".{name}."): value.clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    experts = EXPERTS if model_type == "qwen3_moe" else {}
    values = {"model_type": model_type, **sizes(model.config.num_key_value_heads), **experts}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@GROUPS
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@pytest.mark.parametrize(("name", "dtype"), [("w_g", "float32"), ("gate_proj", "model"), ("g_proj", "model")])
@torch.no_grad()
def test_separate_gates_are_known_by_their_names(name, dtype, granularity, model_type, num_kv_heads, tmp_path):
    gate = GateSpec(granularity=granularity, dtype=dtype)
    if model_type == "qwen3":
        model = random_model(GatedQwen3Config(**sizes(num_kv_heads), gates=gate))
    else:
        model = random_model(GatedQwen3MoeConfig(**sizes(num_kv_heads), **EXPERTS, gates=gate))
    done = convert(write_separate(tmp_path / "source", model, name, model_type), tmp_path / "gated")
    assert torch.equal(logits(tmp_path / "gated"), model(IDS).logits)
    assert done.gates == (gate,)


def per_head(packed, geometry, gate_rows=DIM):
    q, g = torch.unflatten(packed, 0, (HEADS, DIM + gate_rows)).split([DIM, gate_rows], dim=1)
    return q.flatten(0, 1), g.flatten(0, 1)


def stacked(packed, geometry, gate_rows=DIM):
    return packed[: HEADS * DIM], packed[HEADS * DIM :]


def per_group(packed, geometry):
    return read.split_per_group(packed, geometry, DIM)


@pytest.mark.parametrize(("wrong", "num_kv_heads"), [(per_head, 2), (per_head, 1), (stacked, 4), (stacked, 2)])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@torch.no_grad()
def test_the_release_read_in_a_wrong_layout_differs(wrong, granularity, num_kv_heads, tmp_path, monkeypatch):
    model = write_release(tmp_path / "source", granularity, num_kv_heads)
    monkeypatch.setattr(read, "split_per_group", wrong)
    convert(tmp_path / "source", tmp_path / "gated")
    assert distance(logits(tmp_path / "gated"), model(IDS).logits) > 0.1


@pytest.mark.parametrize("num_kv_heads", [2, 1])
@pytest.mark.parametrize("wrong", [per_group, stacked])
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_architecture_read_in_a_wrong_layout_differs(name, wrong, num_kv_heads, tmp_path, monkeypatch):
    source = save(STOCK[name](num_kv_heads), tmp_path / "source")
    monkeypatch.setattr(read, "split_per_head", wrong)
    convert(source, tmp_path / "gated")
    assert distance(logits(tmp_path / "gated"), logits(source)) > 0.1


@torch.no_grad()
def test_a_separate_gate_in_another_order_differs(tmp_path):
    model = random_model(GatedQwen3Config(**sizes(), gates=GateSpec(dtype="model")))
    expected = model(IDS).logits
    for layer in model.model.layers:
        weight = layer.self_attn.g_proj.weight
        weight.copy_(weight.clone().view(HEADS, DIM, -1).transpose(0, 1).flatten(0, 1))
    convert(write_separate(tmp_path / "source", model, "w_g", "qwen3"), tmp_path / "gated")
    assert distance(logits(tmp_path / "gated"), expected) > 0.1


def test_the_packed_layouts_agree_where_every_head_has_its_own_keys(tmp_path, monkeypatch):
    source = save(STOCK["qwen3_next"](num_kv_heads=4), tmp_path / "source")
    monkeypatch.setattr(read, "split_per_head", per_group)
    convert(source, tmp_path / "gated")
    assert distance(logits(tmp_path / "gated"), logits(source)) <= 1e-5


@torch.no_grad()
def test_fused_experts_are_split(tmp_path):
    model = random_model(GatedQwen3MoeConfig(**sizes(), **EXPERTS))
    convert(write_separate(tmp_path / "source", model, "g_proj", "qwen3_moe"), tmp_path / "gated")
    assert torch.equal(logits(tmp_path / "gated"), model(IDS).logits)


def test_weights_for_predicting_several_tokens_are_left_out(tmp_path):
    source = save(STOCK["qwen3_next"](), tmp_path / "source")
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    extra = {"mtp.fc.weight": torch.zeros(2, 2)}
    save_file(extra, source / "model-2.safetensors")
    names = dict.fromkeys(random_model(STOCK["qwen3_next"]()).state_dict(), "model-1.safetensors")
    index = {"weight_map": names | dict.fromkeys(extra, "model-2.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    done = convert(source, tmp_path / "gated")
    assert done.left_out == ("mtp.fc.weight",)
    assert read_config(tmp_path / "gated")["num_hidden_layers"] == LAYERS
