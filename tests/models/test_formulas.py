"""Every variant against a decoder written here from the paper's formulas, in float64, gradients included.

transformers keeps norms, rotary angles and routers in float32 whatever the model's dtype, hence the tolerance.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.models.parent import CACHE_NAME
from gated_attention.registry.penalty import TARGET_BAND, AuxiliaryWeights
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import ModelSize
from gated_attention.spec import BlockSpec, GateSpec, SwitchSpec
from gated_attention.train.auxiliary import AuxiliaryLosses

DENSE = ModelSize("dense", 2, 24, 4, 2, 8, 96, 31, 16)
MOE = replace(DENSE, name="moe", intermediate_size=8, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)

ACTIVATIONS = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "identity": lambda x: x,
    "ns_sigmoid": lambda x: 0.5 + 0.5 / (1 + torch.exp(-x)),
    "hard_sigmoid": lambda x: torch.clip(x / 6 + 0.5, 0, 1),
    "softplus": lambda x: torch.log1p(torch.exp(x)),
}
PREFIXES = {"sdpa": "", "value": "v_", "key": "k_", "query": "q_", "output": "o_"}


def rms_norm(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x, theta=10_000.0):
    t, d = x.shape[1], x.shape[-1]
    angle = torch.arange(t)[:, None].double() / theta ** (torch.arange(0, d, 2) / d)  # (T, D / 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    low, high = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class Decoder:
    """Qwen3 with a block as the paper changes it, read from a state dict; keeps what auxiliary losses are made of."""

    def __init__(self, weights, size, block):
        self.weights, self.size, self.block = weights, size, block
        self.router_logits, self.hard_scores, self.clipped_shares = [], [], []

    def __call__(self, ids):
        x = F.embedding(ids, self.weights["model.embed_tokens.weight"])
        for index in range(self.size.num_hidden_layers):
            x = self.layer(x, f"model.layers.{index}.")
        return rms_norm(x, self.weights["model.norm.weight"]) @ self.weights["lm_head.weight"].T

    def layer(self, x, at):
        w, block = self.weights, self.block
        y = self.attention(rms_norm(x, w[at + "input_layernorm.weight"]), at + "self_attn.")
        if block.sandwich_norm:
            y = rms_norm(y, w[at + "attention_output_layernorm.weight"])
        x = x + self.clip(y)
        y = self.ffn(rms_norm(x, w[at + "post_attention_layernorm.weight"]), at + "mlp.")
        if block.sandwich_norm:
            y = rms_norm(y, w[at + "feedforward_output_layernorm.weight"])
        return x + self.clip(y)

    def clip(self, y):
        bound = self.block.output_clip
        if bound is None:
            return y
        self.clipped_shares.append((y.abs() > bound).double().mean().item())
        return torch.maximum(torch.minimum(y, torch.tensor(bound)), torch.tensor(-bound))

    def ffn(self, x, at):
        w = self.weights
        if not self.size.num_experts:
            gate, up, down = (w[f"{at}{name}_proj.weight"].T for name in ("gate", "up", "down"))
            return (F.silu(x @ gate) * (x @ up)) @ down
        logits = x @ w[at + "gate.weight"].T
        self.router_logits.append(logits.flatten(0, 1))
        shares = logits.softmax(-1)
        best = shares.topk(self.size.num_experts_per_tok, -1)
        out = torch.zeros_like(x)
        for expert in range(self.size.num_experts):
            share = (best.values * (best.indices == expert)).sum(-1, keepdim=True) / best.values.sum(-1, keepdim=True)
            gate, up = (x @ w[at + "experts.gate_up_proj"][expert].T).chunk(2, -1)
            out = out + share * ((F.silu(gate) * up) @ w[at + "experts.down_proj"][expert].T)
        return out

    def attention(self, x, at):
        w, size, d = self.weights, self.size, self.size.head_dim
        q = self.gate("query", (x @ w[at + "q_proj.weight"].T).unflatten(-1, (-1, d)), x, at)
        k = self.gate("key", self.project("k", x, at), x, at)
        v = self.gate("value", self.project("v", x, at), x, at)
        q, k = rope(rms_norm(q, w[at + "q_norm.weight"])), rope(rms_norm(k, w[at + "k_norm.weight"]))
        heads = torch.arange(size.num_attention_heads) // (size.num_attention_heads // size.num_key_value_heads)
        scores = torch.einsum("bthd,bshd->bhts", q, k[:, :, heads]) / d**0.5
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
        for spec in self.block.gates:
            if spec.input == "lse":  # one more term in the softmax's denominator, that of a sink without a value
                sink = torch.zeros(size.num_attention_heads) if spec.bias is None else -w[at + "g_proj.bias"]
                sink = sink[:, None, None].expand(*scores.shape[:-1], 1)
                scores = torch.cat((scores, sink.to(scores.dtype)), -1)
        weights = scores.softmax(-1)[..., : x.shape[1]]
        y = torch.einsum("bhts,bshd->bthd", weights, v[:, :, heads])
        if self.block.sdpa_transform == "rms_norm":
            y = rms_norm(y, w[at + "sdpa_norm.weight"])
        elif self.block.sdpa_transform == "silu":
            y = y / (1 + torch.exp(-y))
        y = self.gate("sdpa", y, x, at).flatten(-2) @ w[at + "o_proj.weight"].T
        return self.gate("output", y[:, :, None], x, at)[:, :, 0]

    def project(self, name, x, at):
        w, d, switch = self.weights[at + f"{name}_proj.weight"], self.size.head_dim, self.block.switch
        if switch is None or (name == "k" and switch.maps == "value"):
            return (x @ w.T).unflatten(-1, (-1, d))
        scores = ACTIVATIONS["sigmoid"](x @ self.weights[at + "switch_router.weight"].T)
        scores = scores.unflatten(-1, (-1, switch.num_experts))  # (B, T, K, E)
        place = scores.argsort(-1, descending=True).argsort(-1)
        scores = scores * (place < switch.top_k)
        maps = w.unflatten(0, (-1, switch.num_experts, d))  # (K, E, D, C)
        return torch.einsum("btke,kedc,btc->btkd", scores, maps, x)

    def gate(self, site, y, x, at):
        for spec in self.block.gates:
            if spec.site != site or spec.input == "lse":
                continue
            name = at + PREFIXES[site] + "g_proj."
            read = torch.ones(1, 1, 1, dtype=x.dtype) if spec.input == "parameter" else x[..., : spec.input_dim]
            logits = read @ self.weights[name + "weight"].T
            if spec.bias is not None:
                logits = logits + self.weights[name + "bias"]
            logits = logits.unflatten(-1, (-1, 1 if spec.granularity == "headwise" else y.shape[-1]))
            scores = ACTIVATIONS[spec.activation](logits)
            if spec.activation == "hard_sigmoid":
                self.hard_scores.append(scores)
            scores = spec.scale * (scores.mean(2, keepdim=True) if spec.head_shared else scores)
            y = y * scores if spec.combine == "multiply" else y + scores
        return y

    def auxiliary_losses(self, weights):
        total = torch.zeros((), dtype=torch.float64)
        for logits in self.router_logits:
            num_experts, k = self.size.num_experts, self.size.num_experts_per_tok
            sent = F.one_hot(logits.topk(k, -1).indices, num_experts).sum((0, 1)) / (k * len(logits))
            balance = num_experts * (sent * logits.softmax(-1).mean(0)).sum()
            z = logits.exp().sum(-1).log().square().mean()
            total = total + (weights.load_balance * balance + weights.router_z * z) / len(self.router_logits)
        if weights.gate_penalty:
            scores, target = torch.stack(self.hard_scores), weights.gate_penalty.target
            excess = 1.0 if target is None else float((scores > 0).double().mean() - target) / TARGET_BAND
            total = total + weights.gate_penalty.weight * min(max(excess, 0.0), 1.0) * scores.mean()
        return total


def randomised(size, block):
    """The model in float64, with weights large enough that every mechanism matters."""
    model = build_model(make_config(size, block), seed=0).double()
    if size.num_experts:
        model.set_experts_implementation("eager")  # the grouped product has no float64
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if block.output_clip and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(block.output_clip)  # outputs around the bound
    return model


def assert_close(name, found, expected):
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), name


def check(size, block, penalty=None):
    model = randomised(size, block)
    ids = torch.randint(size.vocab_size, (2, 11), generator=torch.Generator().manual_seed(2))
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    if size.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    factors = AuxiliaryWeights(0.5, 0.1, penalty)
    decoder, auxiliary = Decoder(weights, size, block), AuxiliaryLosses(model, factors)
    expected = decoder(ids)
    with auxiliary.gather():
        found = model(input_ids=ids).logits
    assert_close("logits", found, expected)
    assert all(0.1 < share < 0.9 for share in decoder.clipped_shares)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reached = assert_same_gradients(model, weights, (found * direction).sum(), (expected * direction).sum())
    assert reached == {name for name, _ in model.named_parameters()}
    if size.num_experts or penalty:
        found, expected = auxiliary.loss(), decoder.auxiliary_losses(factors)
        assert_close("auxiliary losses", found, expected)
        reached = assert_same_gradients(model, weights, found, expected)
        assert not size.num_experts or "model.layers.1.mlp.gate.weight" in reached
        assert not penalty or "model.layers.1.self_attn.g_proj.weight" in reached


def assert_same_gradients(model, weights, found, expected):
    """Compares the gradients of every parameter; returns the names of those that have one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(found, parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, [weights[name] for name in names], retain_graph=True, allow_unused=True)
    for name, gradient, exact in zip(names, ours, theirs, strict=True):
        assert (gradient is None) == (exact is None), f"{name} has a gradient on one side only"
        if exact is not None:
            assert_close(name, gradient, exact)
    return {name for name, gradient in zip(names, ours, strict=True) if gradient is not None}


@pytest.mark.parametrize("size", [DENSE, MOE], ids=lambda size: size.name)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_every_variant_is_its_formula(variant, size):
    if "num_experts" in dict(variant.widen) and not size.num_experts:
        with pytest.raises(ValueError, match="size 'dense' has none"):
            variant.resize(size)
        return
    check(variant.resize(replace(size, ffn_multiple=1)), variant.block, variant.gate_penalty)


BLOCKS = {
    "everything": BlockSpec(
        (GateSpec(bias=0.3), GateSpec("output", scale=2.0)), SwitchSpec("key_value", 3, 2), "rms_norm", True, 0.5
    ),
    "a learned sink and gated values": BlockSpec(
        (GateSpec(granularity="headwise", input="lse", bias=0.4), GateSpec("value")), sandwich_norm=True
    ),
    "silu and a headwise gate": BlockSpec((GateSpec(granularity="headwise"),), sdpa_transform="silu"),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_mechanisms_go_together(block):
    check(DENSE, block)


def test_one_map_with_top_one_is_the_headwise_value_gate():
    switch = randomised(DENSE, BlockSpec(switch=SwitchSpec("value", 1, 1)))
    gate = build_model(make_config(DENSE, BlockSpec((GateSpec("value", "headwise"),))), 0).double()
    gate.load_state_dict({name.replace("switch_router", "v_g_proj"): w for name, w in switch.state_dict().items()})
    ids = torch.arange(9)[None]
    torch.testing.assert_close(switch(ids).logits, gate(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("bias", [None, 0.0], ids=["off by one", "learned sink"])
def test_gates_on_the_log_sum_exp_heed_padding_and_the_cache(implementation, bias):
    block = BlockSpec((GateSpec(granularity="headwise", input="lse", bias=bias),))
    model = randomised(DENSE, block).float().eval()
    model.set_attn_implementation(implementation)
    ids = torch.randint(31, (1, 8), generator=torch.Generator().manual_seed(4))
    alone = model(ids).logits
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1)
    mask = (torch.arange(11) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], **{CACHE_NAME: first[CACHE_NAME]})
    torch.testing.assert_close(second.logits, alone[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_gate_on_the_log_sum_exp_refuses_attention_that_returns_none():
    model = randomised(DENSE, BlockSpec((GateSpec(granularity="headwise", input="lse"),)))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' returns no log-sum-exp, .* choose from eager, sdpa"):
        model(torch.arange(4)[None])
