"""Gated Qwen3 beside transformers' Qwen3: equal without gates, and whole with them: cache, files, masks, compile."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM
from gated_attention.models.parent import CACHE_NAME
from gated_attention.nn.block import find_gates
from gated_attention.spec import SITES, GateSpec

VOCABULARY = 61
WIDTHS = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
EVERY_SITE = tuple(GateSpec(site) for site in SITES)
GATE_SETS = {
    **{site: (GateSpec(site),) for site in SITES},
    "headwise": (GateSpec(granularity="headwise"),),
    "every site": EVERY_SITE,
    "parameter": (GateSpec(input="parameter"),),
}


def gated(gates=(), attention="sdpa", **changes):
    config = GatedQwen3Config(**{**WIDTHS, **changes}, gates=gates, attn_implementation=attention)
    return GatedQwen3ForCausalLM(config).eval()


def tokens(batch=2, length=11):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": True}], ids=["", "bias, tied"])
def test_without_gates_it_is_qwen3_exactly(changes, attention, padded):
    theirs = Qwen3ForCausalLM(Qwen3Config(**{**WIDTHS, **changes}, attn_implementation=attention)).eval()
    ours = gated((), attention, **changes)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0 if padded else 1
    batch = {"input_ids": tokens(), "attention_mask": mask, "labels": tokens()}
    found, expected = ours(**batch), theirs(**batch)
    assert found.logits.equal(expected.logits)
    assert found.loss.equal(expected.loss)
    found.loss.backward()
    expected.loss.backward()
    for (name, ours_parameter), theirs_parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert ours_parameter.grad.equal(theirs_parameter.grad), name


@pytest.mark.parametrize("gates", GATE_SETS.values(), ids=GATE_SETS.keys())
def test_a_gate_changes_the_logits_and_learns(gates):
    model = gated(gates)
    plain = gated()
    plain.load_state_dict(model.state_dict(), strict=False)
    output = model(tokens(), labels=tokens())
    assert not output.logits.allclose(plain(tokens()).logits)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gates_that_start_at_one_change_nothing():
    model = gated(tuple(GateSpec(site, init="zeros", scale=2.0) for site in SITES))
    plain = gated()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert model(tokens()).logits.equal(plain(tokens()).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gates", GATE_SETS.values(), ids=GATE_SETS.keys())
def test_generation_with_the_cache_is_the_uncached_forward(gates, attention):
    model = gated(gates, attention)
    prompt = tokens(2, 7)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(prompt, use_cache=True, **options)
    uncached = model.generate(prompt, use_cache=False, **options)
    assert cached.sequences.equal(uncached.sequences)
    assert cached[CACHE_NAME].get_seq_length() == 15
    whole = model(cached.sequences).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1), whole, rtol=1e-4, atol=1e-5)
    assert whole.argmax(-1).equal(cached.sequences[:, 7:])


def test_the_cache_continues_a_context_in_blocks():
    model, context = gated(EVERY_SITE), tokens(2, 11)
    first = model(context[:, :5], use_cache=True)
    second = model(context[:, 5:], **{CACHE_NAME: first[CACHE_NAME]})
    torch.testing.assert_close(second.logits, model(context).logits[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gates", [(), *GATE_SETS.values()], ids=["none", *GATE_SETS])
def test_left_padding_does_not_change_real_tokens(gates, attention):
    model = gated(gates, attention)
    text, padding = tokens(1, 7), torch.zeros(1, 4, dtype=torch.long)
    batch = torch.cat((torch.cat((padding, text), 1), tokens(1, 11)))
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(batch, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:1, 4:], model(text).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[1:], model(batch[1:]).logits, rtol=1e-4, atol=1e-5)


def test_a_padded_batch_generates_what_each_text_does_alone():
    model = gated(EVERY_SITE)
    short, long = tokens(1, 4), tokens(1, 9)
    batch = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.long), short), 1), long))
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    alone = [model.generate(text, **options)[0, text.shape[1] :] for text in (short, long)]
    assert together.equal(torch.stack(alone))


def test_a_model_survives_its_files(tmp_path):
    gates = (GateSpec(granularity="headwise", bias=0.5), *EVERY_SITE[1:])
    model = gated(gates)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is GatedQwen3ForCausalLM
    assert loaded.config.gates == gates
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.eval()(tokens()).logits.equal(model(tokens()).logits)


def test_the_sdpa_gate_is_stored_as_g_proj(tmp_path):
    gated((GateSpec(granularity="headwise"), GateSpec("value"))).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.self_attn.g_proj.weight"].shape == (4, 32)
    assert stored["model.layers.1.self_attn.v_g_proj.weight"].shape == (16, 32)


STARTS = {
    "normal": (GateSpec(),),
    "zeros": (GateSpec(granularity="headwise", init="zeros"),),
    "bias": (GateSpec(granularity="headwise", init="zeros", bias=-1.5), GateSpec("value", bias=2.0)),
    "parameter": (GateSpec(input="parameter", init="zeros"),),
}


def assert_gates_start_as_they_say(model):
    gates = list(find_gates(model))
    assert len(gates) == len(model.config.gates) * model.config.num_hidden_layers
    for spec, gate, _ in gates:
        if spec.init == "zeros":
            assert not gate.weight.any()
        else:
            # 512 numbers or more: the standard error of the deviation is 3 %.
            assert gate.weight.std().item() == pytest.approx(WIDTHS["initializer_range"], rel=0.15)
        if spec.bias is not None:
            assert gate.bias.eq(spec.bias).all()


@pytest.mark.parametrize("gates", STARTS.values(), ids=STARTS.keys())
def test_a_new_model_starts_its_gates_as_they_say(gates):
    assert_gates_start_as_they_say(gated(gates))


@pytest.mark.parametrize("gates", STARTS.values(), ids=STARTS.keys())
def test_a_plain_checkpoint_loads_into_a_gated_model(gates, tmp_path):
    plain = Qwen3ForCausalLM(Qwen3Config(**WIDTHS))
    plain.save_pretrained(tmp_path)
    loaded, report = GatedQwen3ForCausalLM.from_pretrained(tmp_path, gates=gates, output_loading_info=True)
    expected = {name for name, _ in loaded.named_parameters() if "g_proj" in name}
    assert set(report["missing_keys"]) == expected
    assert len(expected) >= 2 * len(gates)
    assert not report["unexpected_keys"]
    assert_gates_start_as_they_say(loaded)
    weights = loaded.state_dict()
    for name, weight in plain.state_dict().items():
        assert weights[name].equal(weight), name


def test_a_partly_stored_gate_keeps_what_is_stored(tmp_path):
    gates = (GateSpec(granularity="headwise", init="zeros", bias=-1.5),)
    model = gated(gates)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = {"model.layers.0.self_attn.g_proj.bias", "model.layers.1.self_attn.g_proj.weight"}
    save_file(
        {name: x for name, x in stored.items() if name not in lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    loaded, report = GatedQwen3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == lost
    first, second = (layer.self_attn.g_proj for layer in loaded.model.layers)
    assert first.bias.eq(-1.5).all()
    assert not second.weight.any()
    weights = loaded.state_dict()
    for name in stored.keys() - lost:
        assert weights[name].equal(stored[name]), name


def gradients(model, run):
    model.zero_grad()
    output = run(input_ids=tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()
    return {"logits": output.logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


# Renamed in newer versions of transformers, where the old name, the only one that all have, still works.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    model = gated(EVERY_SITE).train()
    expected = gradients(model, model)
    model.gradient_checkpointing_enable()
    runs = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    found = gradients(model, model)
    assert len(runs) == 2  # once more in the backward
    for name, gradient in found.items():
        assert gradient.equal(expected[name]), name


@pytest.mark.parametrize("gates", [GATE_SETS["headwise"], EVERY_SITE], ids=["headwise", "every site"])
def test_the_model_compiles_whole(gates, compile_whole):
    model = gated(gates).train()
    expected = gradients(model, model)
    found = gradients(model, compile_whole(model, backend="aot_eager"))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_hidden_states_and_attentions_are_recorded():
    model = gated(EVERY_SITE, "eager")
    output = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 11, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 11, 11)] * 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11))
        assert not weights.triu(1).any()
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_the_attention_implementation_can_be_changed():
    model = gated(EVERY_SITE)
    expected = model(tokens()).logits
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_models_run_in_bfloat16():
    model = gated(EVERY_SITE).bfloat16()
    output = model(tokens(), labels=tokens())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())


def test_a_bfloat16_gate_in_model_dtype_is_hugging_faces_expression():
    model = gated((GateSpec(dtype="model"),)).bfloat16()
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 5, 32).bfloat16(), torch.randn(2, 5, 4, 8).bfloat16()
    expected = y.reshape(2, 5, -1) * torch.sigmoid(attention.g_proj(x))
    assert attention.gate("sdpa", y, x).reshape(2, 5, -1).equal(expected)
