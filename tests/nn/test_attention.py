"""Gated attention as one module, against formulas written here and against transformers' Qwen3."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from gated_attention import GatedAttention, GateSpec
from gated_attention.nn.attention import apply_rope
from gated_attention.spec import SITES

B, T, C, H, K, D = 2, 13, 48, 6, 3, 8
EVERY_SITE = tuple(GateSpec(site) for site in SITES)


def test_three_lines_are_enough():
    attention = GatedAttention(hidden_size=512, num_heads=8, gates=GateSpec())
    out = attention(torch.randn(2, 10, 512))
    assert out.shape == (2, 10, 512)
    assert attention.g_proj.weight.shape == (512, 512)


def rotate(x, theta=10_000.0):
    """RoPE as a rotation of complex numbers; channel i is the real and i + d / 2 the imaginary part."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half).double()
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def gated_attention(block, x, weight, spec):
    """The block with one elementwise or headwise multiplicative sigmoid gate, in one plain formula."""
    scores = torch.sigmoid(F.linear(x, weight))

    def gate(site, y):
        if site != spec.site:
            return y
        return y * (scores if spec.granularity == "elementwise" else scores.repeat_interleave(D, -1))

    def norm(y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    q = rotate(norm(gate("query", F.linear(x, block.q_proj.weight)).view(B, T, H, D)))
    k = rotate(norm(gate("key", F.linear(x, block.k_proj.weight)).view(B, T, K, D)))
    v = gate("value", F.linear(x, block.v_proj.weight)).view(B, T, K, D)
    heads = []
    for head in range(H):
        scores_of_head = q[:, :, head] @ k[:, :, head // 2].mT / D**0.5
        scores_of_head += torch.full((T, T), float("-inf")).triu(1)
        heads.append(scores_of_head.softmax(-1) @ v[:, :, head // 2])
    y = gate("sdpa", torch.cat(heads, -1))
    return gate("output", F.linear(y, block.o_proj.weight))


@pytest.mark.parametrize(
    "spec",
    [*EVERY_SITE, GateSpec(granularity="headwise"), GateSpec("value", "headwise")],
    ids=lambda spec: f"{spec.site} {spec.granularity}",
)
def test_each_site_is_its_plain_formula(spec):
    block = GatedAttention(C, H, K, D, gates=spec).double()
    names = {"sdpa": "g_proj", "value": "v_g_proj", "key": "k_g_proj", "query": "q_g_proj", "output": "o_g_proj"}
    weight = block.get_parameter(f"{names[spec.site]}.weight")
    torch.nn.init.normal_(weight, std=0.5)  # gates far from one another, not all near a half
    x = torch.randn(B, T, C, dtype=torch.float64)
    # Angles are formed in float32.
    torch.testing.assert_close(block(x), gated_attention(block, x, weight, spec), rtol=1e-5, atol=1e-6)


def test_several_gates_act_each_at_its_site():
    x = torch.randn(B, T, C)
    block = GatedAttention(C, H, K, D, gates=reversed(EVERY_SITE))
    assert [spec.site for spec in block.gates] == list(SITES)
    gates = [name for name, _ in block.named_children() if name.endswith("g_proj")]
    assert gates == ["g_proj", "v_g_proj", "k_g_proj", "q_g_proj", "o_g_proj"]
    out = block(x)
    for name in gates:
        before = block.get_submodule(name).weight.detach().clone()
        torch.nn.init.normal_(block.get_submodule(name).weight)
        assert not block(x).allclose(out)
        with torch.no_grad():
            block.get_submodule(name).weight.copy_(before)
    assert block(x).equal(out)


@pytest.mark.parametrize("gates", [(), EVERY_SITE], ids=["no gate", "every site"])
def test_a_later_token_does_not_change_earlier_outputs(gates):
    block = GatedAttention(C, H, K, D, gates=gates)
    x = torch.randn(B, T, C)
    changed = x.clone()
    changed[:, 7] += 1.0
    out, out_changed = block(x), block(changed)
    torch.testing.assert_close(out_changed[:, :7], out[:, :7], rtol=0, atol=0)
    assert (out_changed[:, 7:] - out[:, 7:]).abs().amax(-1).gt(1e-6).all()


def test_without_causality_every_token_sees_every_other():
    block = GatedAttention(C, H, K, D, causal=False)
    x = torch.randn(1, T, C)
    changed = x.clone()
    changed[:, -1] += 1.0
    assert (block(changed) - block(x)).abs().amax(-1).gt(1e-6).all()


def test_a_mask_hides_tokens_as_if_they_were_not_there():
    block = GatedAttention(C, H, K, D, gates=GateSpec(), rope_theta=None)
    x = torch.randn(1, T, C)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool)
    mask[..., :4] = False
    torch.testing.assert_close(block(x, mask)[:, 4:], block(x[:, 4:]))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_backend_does_not_change_the_result(backend):
    block = GatedAttention(C, H, K, D, gates=EVERY_SITE)
    x = torch.randn(B, T, C)
    expected = block(x)
    block.backend = backend
    torch.testing.assert_close(block(x), expected)


def test_closed_gates_are_skipped():
    block = GatedAttention(C, H, K, D, gates=GateSpec(granularity="headwise", activation="hard_sigmoid", bias=-3.0))
    x = torch.randn(B, T, C)
    expected, gradients = block(x), []
    for backend in ("auto", "skip"):
        block.backend = backend
        block.zero_grad()
        block(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    torch.testing.assert_close(block(x), expected)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def qwen3(theta=10_000.0, **changes):
    widths = {"hidden_size": C, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D}
    rope = {"rope_type": "default", "rope_theta": theta}
    return Qwen3Config(
        **{**widths, "num_hidden_layers": 1, "rope_parameters": rope, "attn_implementation": "eager", **changes}
    )


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_rope_is_that_of_qwen3(theta):
    x = torch.randn(1, 512, 2, 128)
    rotary = Qwen3RotaryEmbedding(qwen3(theta, head_dim=128))
    expected, _ = apply_rotary_pos_emb(x, x, *rotary(x, torch.arange(512)[None]), unsqueeze_dim=2)
    torch.testing.assert_close(apply_rope(x, theta), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_without_gates_it_is_qwen3s_attention(bias):
    theirs = Qwen3Attention(qwen3(attention_bias=bias), layer_idx=0)
    torch.nn.init.normal_(theirs.q_norm.weight)
    ours = GatedAttention(C, H, K, D, bias=bias)
    ours.load_state_dict(theirs.state_dict())  # the same names
    x = torch.randn(B, T, C)
    position_embeddings = Qwen3RotaryEmbedding(theirs.config)(x, torch.arange(T)[None])
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    torch.testing.assert_close(ours(x), theirs(x, position_embeddings, mask)[0], rtol=1e-5, atol=1e-6)


def test_without_norm_and_rope_only_the_projections_remain():
    block = GatedAttention(C, H, gates=GateSpec("query", "headwise"), qk_norm=False, rope_theta=None)
    parameters = {name for name, _ in block.named_parameters()}
    assert parameters == {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_g_proj")}
    x = torch.randn(1, T, C)
    order = torch.randperm(T)
    block.causal = False
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])  # no position is left to tell tokens apart


def test_every_parameter_gets_a_gradient():
    block = GatedAttention(C, H, K, D, gates=EVERY_SITE, bias=True)
    block(torch.randn(B, T, C)).square().sum().backward()
    for name, parameter in block.named_parameters():
        # The softmax does not see a constant added to every key, but RoPE turns it differently at each position.
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_bfloat16_and_autocast():
    block = GatedAttention(C, H, K, D, gates=EVERY_SITE)
    x = torch.randn(B, T, C)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    low = block.bfloat16()(x.bfloat16())
    assert mixed.dtype == low.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, low, rtol=0.05, atol=5e-3)


def test_the_block_compiles_whole(compile_whole):
    block = GatedAttention(C, H, K, D, gates=(GateSpec(), GateSpec("value", "headwise"), GateSpec("output")))
    x = torch.randn(B, T, C)
    gradients = []
    for run in (block, compile_whole(block, backend="aot_eager")):
        block.zero_grad()
        run(x).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in block.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ((50, 8), {}, "hidden_size 50 is not a multiple of num_heads 8; give head_dim"),
        ((64, 0), {}, "num_heads is 0; it must be at least 1"),
        ((64, 8, 0), {}, "num_kv_heads is 0; it must be at least 1"),
        ((64, 8, 4, 0), {}, "head_dim is 0; it must be at least 1"),
        ((64, 8, 3), {}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ((64, 8, 8, 7), {}, "head_dim 7 is odd; use rope_theta=None"),
        ((64, 8), {"gates": (GateSpec(), GateSpec())}, "two gates at site 'sdpa'"),
        ((64, 8), {"gates": GateSpec(input_dim=65)}, "input_dim 65 exceeds hidden_size 64"),
        ((64, 8), {"gates": GateSpec("key", "headwise")}, "divided out by the QK-norm"),
        ((64, 8), {"gates": "headwise"}, "'headwise' is not a gate"),
        ((64, 8), {"gates": GateSpec(), "backend": "skip"}, "'skip' is for one hard_sigmoid per head on the output of"),
        (
            (64, 8),
            {"gates": GateSpec("sdpa", "headwise", activation="hard_sigmoid"), "backend": "shifted"},
            "a plain sig",
        ),
        ((64, 8), {"backend": "flash"}, "unknown attention backend 'flash'; choose from auto, eager, sdpa, flex"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_block_is_built(widths, options, message):
    with pytest.raises(ValueError, match=message) as error:
        GatedAttention(*widths, **options)
    assert "\n" not in str(error.value)
