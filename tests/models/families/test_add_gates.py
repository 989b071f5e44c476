"""Gates in models of other families: they change nothing until trained, train, save, load, generate, and go away."""

import json
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import transformers as tf
from family_models import FAMILIES, make_inputs, make_model, output

from gated_attention import GateSpec
from gated_attention.analysis import inspect_model
from gated_attention.models import GatedQwen3Config, add_gates, gated, remove_gates
from gated_attention.models.families.configuration import gated_type
from gated_attention.models.families.projections import GatedProjectionsMixin, GatedView
from gated_attention.spec import SITES

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers, PEFT and FlexAttention say of themselves

EVERY_SITE = [GateSpec(site) for site in SITES]
HEADWISE = GateSpec(granularity="headwise")

FEW = ["llama", "gpt2", "bert", "vit", "whisper"]
"""One family per layout and kind of model; the others are marked `trust`."""

each_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.trust) for name in FAMILIES]
)


def gates_for(name, neutral=False):
    specs = [spec for spec in EVERY_SITE if spec.site not in FAMILIES[name].no_sites]
    return [spec.neutral() for spec in specs] if neutral else specs


@each_family
def test_neutral_gates_change_nothing_and_go_without_a_trace(name):
    model = make_model(name)
    kind, before, keys, config = type(model), output(name, model), list(model.state_dict()), model.config.to_dict()
    add_gates(model, gates_for(name, neutral=True))
    assert torch.equal(output(name, model), before)
    remove_gates(model)
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert not any(isinstance(module, GatedProjectionsMixin) for module in model.modules())
    assert torch.equal(output(name, model), before)


@each_family
def test_every_site_trains_and_a_saved_folder_gives_the_same_bits(name, tmp_path):
    plain = output(name, make_model(name))
    model = add_gates(make_model(name), gates_for(name))
    result = output(name, model)
    assert not torch.equal(result, plain)
    result.square().sum().backward()
    gates = {key: p for key, p in model.named_parameters() if "g_proj" in key}
    assert len({key.split(".")[-2] for key in gates}) == len(gates_for(name))
    for key, parameter in gates.items():
        assert parameter.grad.abs().sum() > 0, key
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert stored == gated_type(make_model(name).config.model_type)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(name, again), result)


GENERATING = [name for name, family in FAMILIES.items() if "CausalLM" in family.kind or "LMHead" in family.kind]
GENERATING += ["bart", "t5", "whisper"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.trust) for name in GENERATING]
)
def test_it_generates_with_a_cache_as_without(name):
    model = add_gates(make_model(name), gates_for(name))
    inputs = {key: value for key, value in make_inputs(name, model).items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


def test_a_static_cache_and_left_padding_give_the_same_tokens():
    model = add_gates(make_model("llama"), EVERY_SITE)
    ids = make_inputs("llama", model)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids[:1], **options)
    assert torch.equal(model.generate(ids[:1], **options, cache_implementation="static"), alone)
    padded = torch.cat((torch.zeros_like(ids[:, :3]), ids), 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:1, 3:], alone)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.trust) for name in ("gpt2", "gpt_neox", "bert", "t5", "vit", "whisper")),
    ],
)
def test_it_compiles_whole(name):
    torch.compiler.reset()
    model = add_gates(make_model(name), gates_for(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**make_inputs(name, model))[0], output(name, model))


def by_hand(name, model, site, spec):
    """The output of a model whose projection of `site` is replaced by one that gates by the definition."""
    gates = [
        getattr(layer.self_attn, {"sdpa": "g_proj", "value": "v_g_proj", "output": "o_g_proj"}[site]).weight
        for layer in model.model.layers
    ]
    plain = make_model(name)
    for layer, weight in zip(plain.model.layers, gates, strict=True):
        attention, kept = layer.self_attn, {}
        attention.register_forward_pre_hook(
            lambda _, args, kwargs, kept=kept: kept.update(x=kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )

        def scores(x, like, weight=weight):
            logits = (x.double() @ weight.double().T).sigmoid()
            return logits.repeat_interleave(like.shape[-1] // logits.shape[-1], -1)

        if site == "sdpa":
            attention.o_proj.register_forward_pre_hook(
                lambda _, args, kept=kept, scores=scores: ((args[0] * scores(kept["x"], args[0])).float(),)
            )
        elif site == "value":
            attention.v_proj.register_forward_hook(lambda _, args, y, scores=scores: (y * scores(args[0], y)).float())
        else:
            attention.o_proj.register_forward_hook(
                lambda _, args, y, kept=kept, scores=scores: (y * scores(kept["x"], y)).float()
            )
    return output(name, plain)


@pytest.mark.parametrize("site", ["sdpa", "value", "output"])
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_it_is_the_gate_of_the_definition(site, granularity):
    if site == "output" and granularity == "headwise":
        return
    spec = GateSpec(site, granularity=granularity)
    model = add_gates(make_model("llama"), spec)
    torch.testing.assert_close(output("llama", model), by_hand("llama", model, site, spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox"])
def test_a_gate_on_packed_values_leaves_queries_and_keys_alone(name):
    seen = {}

    def run(model, attention):
        projection = getattr(attention, "c_proj", getattr(attention, "o_proj", getattr(attention, "dense", None)))
        hooks = [
            attention.register_forward_hook(lambda *call: seen.update(weights=call[-1][1])),
            projection.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
        ]
        output(name, model)
        for hook in hooks:
            hook.remove()
        return dict(seen)

    model = make_model(name, attn_implementation="eager")
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    before = run(model, attention)
    add_gates(model, GateSpec("value", granularity="headwise", bias=-60.0))  # shut
    after = run(model, attention)
    torch.testing.assert_close(after["weights"], before["weights"])
    assert before["heads"].abs().max() > 1e-3
    assert after["heads"].abs().max() < 1e-20


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "gated_attention"])
def test_every_implementation_gates(implementation):
    model = add_gates(make_model("llama"), HEADWISE)
    expected = output("llama", model)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        torch.testing.assert_close(output("llama", model), expected, rtol=1e-5, atol=1e-6)


def test_the_fused_implementation_takes_the_gate_that_it_can_and_leaves_others(monkeypatch):
    taken = []
    take = GatedView.take_gate_logits
    monkeypatch.setattr(GatedView, "take_gate_logits", lambda *x: taken.append(logits := take(*x)) or logits)
    for spec, fuses in ((HEADWISE, True), (GateSpec(activation="silu", combine="add"), False)):
        model = add_gates(make_model("llama"), spec)
        expected = output("llama", model)
        model.set_attn_implementation("gated_attention")
        taken.clear()
        torch.testing.assert_close(output("llama", model), expected, rtol=1e-5, atol=1e-6)
        assert [logits is not None for logits in taken] == [fuses] * 2


def test_closed_gates_are_skipped_or_the_block_is_refused():
    hard = GateSpec(granularity="headwise", activation="hard_sigmoid", bias=-1.0)
    model = add_gates(make_model("llama"), hard)
    expected = output("llama", model)
    model.set_attn_implementation("gated_attention_skip")
    torch.testing.assert_close(output("llama", model), expected, rtol=1e-5, atol=1e-6)
    model = add_gates(make_model("llama"), HEADWISE)
    model.set_attn_implementation("gated_attention_skip")
    with pytest.raises(ValueError, match=r"'gated_attention_skip' skips closed gates.* has G1 sdpa headwise"):
        output("llama", model)


def test_layers_and_kinds_of_attention_are_chosen():
    def gated_names(model):
        return [name for name, module in model.named_modules() if isinstance(module, GatedProjectionsMixin)]

    assert gated_names(add_gates(make_model("llama"), layers=[1])) == ["model.layers.1.self_attn"]
    types = {"layer_types": ["sliding_attention", "full_attention"]}
    assert gated_names(add_gates(make_model("gemma3", **types), layers="full_attention")) == [
        "model.layers.1.self_attn"
    ]
    crossing = gated_names(add_gates(make_model("bart"), attention="cross"))
    assert crossing == [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]
    within = gated_names(add_gates(make_model("bart"), attention="self", layers=range(1)))
    assert within == ["model.encoder.layers.0.self_attn", "model.decoder.layers.0.self_attn"]


def test_chosen_layers_are_saved(tmp_path):
    model = add_gates(make_model("bart"), HEADWISE, layers=[1], attention="cross")
    model.save_pretrained(tmp_path)
    again = gated(tf.BartForConditionalGeneration).from_pretrained(tmp_path).eval()
    assert torch.equal(output("bart", again), output("bart", model))
    assert list(again.state_dict()) == list(model.state_dict())


def test_gates_in_some_layers_of_a_stock_qwen3_are_not_taken_for_this_packages_model(tmp_path):
    model = add_gates(make_model("qwen3"), HEADWISE, layers=[1])
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(output("qwen3", again), output("qwen3", model))
    own = tf.AutoConfig.for_model("gated_qwen3")
    assert type(own) is GatedQwen3Config


LOAD = """
import sys, torch, transformers as tf
{register}
tf.logging.set_verbosity_error()
model = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
base = tf.AutoModel.from_pretrained(sys.argv[1])
print(type(model).__name__, type(base).__name__, model(torch.arange(9)[None]).logits.double().sum().item())
"""


def test_auto_classes_load_it_after_import_and_refuse_it_without_this_package(tmp_path):
    model = add_gates(make_model("llama"), EVERY_SITE)
    model.save_pretrained(tmp_path)

    def load(register):
        command = [sys.executable, "-c", LOAD.format(register=register), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    found = load("import gated_attention.models")
    kind, base, total = found.stdout.split()
    assert (kind, base) == ("GatedLlamaForCausalLM", "GatedLlamaModel")
    assert float(total) == pytest.approx(model(torch.arange(9)[None]).logits.double().sum().item(), abs=1e-5)
    refused = load("")
    assert refused.returncode == 1
    assert "`gated_llama`" in refused.stderr


def test_a_plain_checkpoint_gets_gates_as_their_specs_say(tmp_path):
    plain = make_model("llama")
    plain.save_pretrained(tmp_path)
    kind = gated(tf.LlamaForCausalLM)
    assert kind is gated(tf.LlamaForCausalLM)
    model = kind.from_pretrained(tmp_path, gates=GateSpec().neutral()).eval()
    assert torch.equal(output("llama", model), output("llama", plain))
    model = kind.from_pretrained(tmp_path, gates=GateSpec(bias=1.0))
    gate = model.model.layers[1].self_attn.g_proj
    assert (gate.bias == 1.0).all()
    assert 0.015 < gate.weight.std() < 0.025


def test_two_gated_models_and_a_plain_one_live_in_one_process():
    config = make_model("llama").config
    first, second, plain = (tf.LlamaForCausalLM(config).eval() for _ in range(3))
    expected = output("llama", plain)
    add_gates(first, HEADWISE)
    add_gates(second, GateSpec("value"), layers=[0])
    assert type(plain) is tf.LlamaForCausalLM
    assert plain.config.model_type == "llama"
    assert torch.equal(output("llama", plain), expected)
    assert first.config.gates == (HEADWISE,)
    assert second.config.gates == (GateSpec("value"),)
    copied = deepcopy(first)
    before = output("llama", first)
    remove_gates(first)
    assert torch.equal(output("llama", copied), before)


def test_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        model = add_gates(make_model("llama"), EVERY_SITE).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output("llama", model).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_adapters_come_before_the_gate():
    peft = pytest.importorskip("peft")
    model = add_gates(make_model("llama"), EVERY_SITE)
    settings = peft.LoraConfig(target_modules=["v_proj", "o_proj", "g_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    result = output("llama", adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output("llama", merged), result, rtol=1e-4, atol=1e-5)
    default = peft.get_peft_model(add_gates(make_model("llama")), peft.LoraConfig())
    targets = {name.split(".lora_A")[0].split(".")[-1] for name, _ in default.named_parameters() if "lora_A" in name}
    assert targets == {"q_proj", "v_proj"}


def test_the_trainer_trains_gates(tmp_path):
    model = add_gates(make_model("llama"), HEADWISE)
    before = model.model.layers[0].self_attn.g_proj.weight.clone()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 61, (8, 12))]
    arguments = tf.TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    tf.Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(model.model.layers[0].self_attn.g_proj.weight, before)


def test_analysis_reads_their_gates():
    model = add_gates(make_model("llama"), HEADWISE)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.g_proj.weight.zero_()
    found = inspect_model(model, [torch.randint(3, 61, (2, 16))])
    ratio = found.measures["size_after_gate"] / found.measures["size_before_gate"]
    torch.testing.assert_close(torch.as_tensor(ratio).double(), torch.full((2, 4), 0.5, dtype=torch.float64))


def small(kind, config, **settings):
    return getattr(tf, kind)(getattr(tf, config)(vocab_size=61, hidden_size=32, num_attention_heads=4, **settings))


REFUSED = {
    "attention of its own": (
        lambda: add_gates(small("FalconForCausalLM", "FalconConfig", num_hidden_layers=1)),
        "its own",
    ),
    "ALiBi": (lambda: add_gates(small("BloomForCausalLM", "BloomConfig", n_layer=1)), "its own"),
    "disentangled": (
        lambda: add_gates(small("DebertaV2Model", "DebertaV2Config", num_hidden_layers=1, intermediate_size=32)),
        "its own",
    ),
    "cancelled": (lambda: add_gates(make_model("qwen3"), GateSpec("query", granularity="headwise")), "QK-norm"),
    "no such layer": (lambda: add_gates(make_model("llama"), layers=[7]), "choose from 0, 1"),
    "no such type": (lambda: add_gates(make_model("gemma3"), layers="linear"), "'linear'"),
    "no such kind": (lambda: add_gates(make_model("llama"), attention="both"), "choose from all, self, cross"),
    "no cross-attention": (lambda: add_gates(make_model("llama"), attention="cross"), "no cross-attention"),
    "latent": (lambda: add_gates(make_model("deepseek_v3"), GateSpec("value")), "choose a gate at 'sdpa'"),
    "log-sum-exp": (
        lambda: add_gates(make_model("llama"), GateSpec(input="lse", granularity="headwise")),
        "log-sum-exp",
    ),
    "twice": (lambda: add_gates(add_gates(make_model("llama"))), "remove_gates"),
    "nothing to remove": (lambda: remove_gates(make_model("llama")), "no gates"),
    "no model": (lambda: add_gates(torch.nn.Linear(2, 2)), "no transformers model"),
    "no class": (lambda: gated(int), "no model class"),
    "no gate": (lambda: add_gates(make_model("llama"), "headwise"), "not a gate"),
    "nothing": (lambda: add_gates(make_model("llama"), []), "no gate is given"),
    "part of a layer": (
        lambda: add_gates(make_model("llama"), layers=[0.5]),
        r"layers are \[0.5\]; give their indices",
    ),
    "one layer": (lambda: add_gates(make_model("llama"), layers="0"), "give indices of layers"),
    "a layer's type in a configuration": (
        lambda: setattr(add_gates(make_model("gemma3")).config, "gated_layers", "full_attention"),
        "layers are 'full_attention'; give their indices",
    ),
    "a plain configuration": (
        lambda: gated(tf.LlamaForCausalLM)(make_model("llama").config),
        "takes a GatedLlamaConfig",
    ),
    "too wide": (lambda: add_gates(make_model("llama"), GateSpec(input_dim=33)), "input_dim 33"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case):
    refused, why = REFUSED[case]
    with pytest.raises(ValueError, match=why) as error:
        refused()
    assert "\n" not in str(error.value)


def test_a_refused_model_is_as_before():
    model = make_model("llama")
    before = output("llama", model)
    with pytest.raises(ValueError, match="input_dim"):
        add_gates(model, [GateSpec(), GateSpec("value", input_dim=99)])
    model.model.layers[1].self_attn.g_proj = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="LlamaAttention has a g_proj already"):
        add_gates(model)
    assert type(model) is tf.LlamaForCausalLM
    assert not hasattr(model.model.layers[0].self_attn, "g_proj")
    assert torch.equal(output("llama", model), before)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_heads_of_a_family_load_its_gates(task, tmp_path):
    model = add_gates(make_model("llama"), [GateSpec(), GateSpec("value")], layers=[1])
    model.save_pretrained(tmp_path / "causal")
    head = getattr(tf, f"AutoModelFor{task}").from_pretrained(tmp_path / "causal")
    gates = {name: tensor for name, tensor in model.state_dict().items() if "g_proj" in name}
    found = {name: tensor for name, tensor in head.state_dict().items() if "g_proj" in name}
    assert len(found) == 2
    assert all(torch.equal(found[name], gates[name]) for name in gates)
    head.save_pretrained(tmp_path / "head")
    again, ids = type(head).from_pretrained(tmp_path / "head"), torch.tensor([[1, 2, 3]])
    assert torch.equal(head.eval()(ids)[0], again.eval()(ids)[0])
    assert "g_proj" not in str(list(remove_gates(again).state_dict()))


def test_whole_models_are_pickled(tmp_path):
    for name in ("llama", "bert", "vit"):
        model = add_gates(make_model(name), gates_for(name))
        torch.save(model, tmp_path / name)
        again = torch.load(tmp_path / name, weights_only=False)
        assert type(again) is type(model)
        assert torch.equal(output(name, again), output(name, model))


def test_gates_of_a_quantised_model_have_its_dtype():
    model = make_model("llama").bfloat16()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # as quantisers leave it
            module.weight = torch.nn.Parameter(module.weight.detach().to(torch.uint8), requires_grad=False)
    add_gates(model)
    assert model.model.layers[0].self_attn.g_proj.weight.dtype == torch.bfloat16
