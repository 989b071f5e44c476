"""What transformers and other engines ask of an attention block and of the classes around it."""

import ast
import inspect
import textwrap

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, Qwen3ForCausalLM, Qwen3Model, StaticCache
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM, GatedQwen3Model
from gated_attention.models.modeling_gated_qwen3 import GatedQwen3Attention
from gated_attention.models.modeling_gated_qwen3_moe import GatedQwen3MoeAttention
from gated_attention.models.parent import CACHE_NAME, init_with
from gated_attention.spec import GateSpec

WIDTHS = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
SINK = GateSpec(granularity="headwise", input="lse", bias=0.5)
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(5))


def gated(gates=(), attention="sdpa", **changes):
    torch.manual_seed(0)
    return GatedQwen3ForCausalLM(
        GatedQwen3Config(**{**WIDTHS, **changes}, gates=gates, attn_implementation=attention)
    ).eval()


@torch.no_grad()
def uncached_eager(model, ids, **options):
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(ids, use_cache=False, **options).logits
    model.set_attn_implementation(implementation)
    return logits


@pytest.mark.parametrize(
    ("gates", "attention"),
    [(SINK, "sdpa"), (SINK, "eager"), (GateSpec(), "gated_attention"), ((), "gated_attention")],
)
@torch.no_grad()
def test_a_prompt_shorter_than_a_static_cache_sees_no_empty_key(gates, attention):
    model = gated(gates, attention)
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits = model(IDS, **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(logits, uncached_eager(model, IDS), rtol=1e-4, atol=1e-5)


def test_the_decoder_shows_the_signature_of_qwen3():
    assert inspect.signature(GatedQwen3Model.forward) == inspect.signature(Qwen3Model.forward)
    positional = [
        p for p in inspect.signature(GatedQwen3Model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert len(positional) > 5
    model = gated(GateSpec(granularity="headwise"))
    embedded = model.model.embed_tokens(IDS)
    torch.testing.assert_close(
        model.model(None, None, None, None, embedded)[0], model.model(IDS).last_hidden_state, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("gates", [SINK, GateSpec()], ids=["lse", "elementwise"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_looking_ahead_on_request_is_obeyed(gates, attention):
    model = gated(gates, attention)
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 61
    ahead, other = (model(ids, is_causal=False, use_cache=False).logits[:, 0] for ids in (IDS, changed))
    assert not ahead.allclose(other)
    torch.testing.assert_close(ahead, uncached_eager(model, IDS, is_causal=False)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gates", [(), SINK, GateSpec()], ids=["none", "lse", "elementwise"])
def test_a_bias_on_the_scores_is_obeyed_or_refused(gates):
    model = gated(gates, "eager")
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    bias = torch.linspace(-2, 2, 81).view(1, 1, 9, 9).masked_fill(hidden, torch.finfo(torch.float32).min)
    found = model(IDS, attention_mask=bias).logits
    assert not found.allclose(model(IDS).logits, atol=1e-2)
    model.set_attn_implementation("sdpa")
    if gates == SINK:
        with pytest.raises(ValueError, match=r"takes boolean masks, .*use 'eager' for a bias"):
            model(IDS, attention_mask=bias)
    else:
        torch.testing.assert_close(model(IDS, attention_mask=bias).logits, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gates", [(), SINK, GateSpec()], ids=["none", "lse", "elementwise"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_boolean_mask_of_four_dimensions_is_obeyed(gates, attention):
    model = gated(gates, attention)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9).clone()
    mask[:, :, 4:, :4] = False
    found = model(IDS, attention_mask=mask).logits[:, 4:]
    positions = torch.arange(4, 9).expand(2, -1)
    torch.testing.assert_close(found, model(IDS[:, 4:], position_ids=positions).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("gates", "attention"), [(SINK, "sdpa"), (SINK, "eager"), (GateSpec(), "gated_attention")])
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"softcap": 30.0}, "does not know softcap"),
        ({"s_aux": torch.zeros(4)}, "does not know s_aux"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "by position_ids, not by cu_seq_lens_q alone"),
    ],
)
def test_what_our_attention_does_not_know_is_refused(gates, attention, asked, words):
    with pytest.raises(ValueError, match=words):
        gated(gates, attention)(IDS, use_cache=False, **asked)


@pytest.mark.parametrize(
    "gates", [GateSpec(), GateSpec(granularity="headwise"), (GateSpec("output"), GateSpec("value"))]
)
def test_heads_side_by_side_from_another_engine_are_gated(gates):
    def engine(module, query, key, value, attention_mask, scaling=None, engine_state=None, **_):
        assert engine_state == "theirs"
        y, _ = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling)
        return y.reshape(-1, y.shape[-2] * y.shape[-1]), None

    AttentionInterface.register("an_engine", engine)
    model = gated(gates)
    expected = model(IDS).logits
    model.set_attn_implementation("an_engine")
    torch.testing.assert_close(model(IDS, engine_state="theirs").logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", [Qwen3Attention, GatedQwen3Attention, GatedQwen3MoeAttention])
def test_vllm_finds_the_attention_call_in_the_source(attention):
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(attention.forward)))))
    found = {
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for node in nodes
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.")
    }
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", None) in found]
    assert len(calls) == 1
    scaling = [ast.unparse(keyword.value) for keyword in calls[0].keywords if keyword.arg == "scaling"]
    assert scaling == ["self.scaling"]


def test_weights_come_with_the_log_sum_exp_where_they_are_formed():
    attentions = gated(SINK, "eager")(IDS, output_attentions=True).attentions
    torch.testing.assert_close([w.sum(-1) for w in attentions], [torch.ones(2, 4, 9)] * 2)


def test_parents_build_our_classes_and_draw_the_same_numbers():
    torch.manual_seed(3)
    theirs = Qwen3ForCausalLM(gated().config)
    torch.manual_seed(3)
    ours = GatedQwen3ForCausalLM(gated().config)
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.equal(expected), name
    with pytest.raises(TypeError, match="Qwen3DecoderLayer of this transformers builds no Qwen3Model"):
        init_with(Qwen3DecoderLayer, Qwen3Model=Qwen3Model)


@pytest.mark.parametrize("gates", [(), SINK, GateSpec()], ids=["none", "lse", "elementwise"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_stay_apart_without_being_asked_for_no_cache(gates, attention, training):
    model = gated(gates, attention).train(training)
    packed = torch.cat((torch.arange(4), torch.arange(5))).expand(2, -1)
    found = model(IDS, position_ids=packed).logits[:, 4:]
    torch.testing.assert_close(found, model(IDS[:, 4:]).logits, rtol=1e-4, atol=1e-5)
    for beside in ({"attention_mask": torch.ones_like(IDS)}, {"use_cache": True}, {CACHE_NAME: DynamicCache()}):
        with pytest.raises(ValueError, match="packed documents do not keep them apart beside"):
            model(IDS, position_ids=packed, **beside)


def test_positions_of_one_document_keep_the_cache():
    positions = torch.arange(3, 12).expand(2, -1)
    assert gated()(IDS, position_ids=positions)[CACHE_NAME].get_seq_length() == 9
