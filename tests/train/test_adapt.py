"""Training new gates: what moves when, resuming to the bit, LoRA that ends up merged."""

import pytest
import torch
from safetensors.torch import load_file
from test_sink_losses import build
from training import CPU, Rows, Stop

from gated_attention import GateSpec
from gated_attention.analysis import inspect_model
from gated_attention.models import add_gates
from gated_attention.train.adapt import AdaptConfig, adapt_model
from gated_attention.train.callbacks import MetricsCallback
from gated_attention.train.metrics import read_metrics
from gated_attention.train.parameters import gate_names
from gated_attention.train.text.data import collate

# PEFT asks for a name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def run(output, family="gemma3", gates=True, stop=None, seed=0, teacher=None, **settings):
    given = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "gate_learning_rate": 20.0, "log_every": 1}
    config = AdaptConfig(**given | {"evaluate_every": 6, "checkpoint_every": 2} | settings)
    model = build(family)
    if gates:
        add_gates(model, GateSpec().neutral())
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    metrics = MetricsCallback(output / "metrics.jsonl")
    model.tokens_seen = adapt_model(
        model, config, teacher=teacher, train_data=Rows(), validation_data=Rows(8), collate=collate, output=output,
        seed=seed, device=CPU, callbacks=[metrics, *([Stop(stop)] if stop else [])],
    )  # fmt: skip
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    return model, moved


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_penalties_lower_what_they_penalise(tmp_path):
    settings = {"steps": 12, "learning_rate": 1e-2, "evaluate_every": 12, "checkpoint_every": 12}
    ids, found = Rows().ids, {}
    for name, weight in (("without", 0.0), ("with", 20.0)):
        model, _ = run(tmp_path / name, sink_weight=weight, activation_weight=weight / 20, **settings)
        inspection = inspect_model(model, [ids])
        found[name] = inspection.overall("f_attn"), inspection.overall("m_act")
    assert found["with"][0] < 0.9 * found["without"][0]
    assert found["with"][1] < found["without"][1]
    lines = [line for line in read_metrics(tmp_path / "with" / "metrics.jsonl") if "loss_nats" in line]
    assert lines[-1]["first_token_attention"] < lines[0]["first_token_attention"]
    assert "first_token_attention" not in read_metrics(tmp_path / "without" / "metrics.jsonl")[0]


@pytest.mark.parametrize("trained", ["whole", "lora", "gates"])
def test_what_moves_is_what_is_trained(trained, tmp_path):
    model, moved = run(tmp_path, trained=trained, lora_rank=2)
    gates = set(gate_names(model))
    assert len(gates) == 3
    assert gates <= moved
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    embedding = "model.embed_tokens.weight"
    assert (embedding in moved) == (trained == "whole")
    assert ("model.layers.0.mlp.up_proj.weight" in moved) == (trained != "gates")
    assert type(model).__name__ == "GatedGemma3ForCausalLM"


def test_gates_train_first_and_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, gate_steps=3, stop=3)
    fresh = dict(add_gates(build("gemma3"), GateSpec().neutral()).named_parameters())
    saved = load_file(tmp_path / "checkpoint-2" / "trained.safetensors")
    assert saved.keys() == fresh.keys()
    moved = {name for name, tensor in saved.items() if not torch.equal(tensor, fresh[name])}
    assert moved == set(gate_names(add_gates(build("gemma3"), GateSpec().neutral())))
    _, moved = run(tmp_path, gate_steps=3)
    assert moved == fresh.keys()


@pytest.mark.parametrize(
    "settings", [{}, {"trained": "lora", "lora_rank": 2}, {"gate_steps": 3}], ids=["whole", "lora", "gates-first"]
)
def test_a_resumed_run_ends_in_the_same_bits(settings, tmp_path):
    whole, _ = run(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=3, **settings)
    resumed, _ = run(tmp_path / "cut", **settings)
    assert all(torch.equal(tensor, state(resumed)[name]) for name, tensor in state(whole).items())
    assert resumed.tokens_seen == whole.tokens_seen == 6 * 4 * 16
    again, _ = run(tmp_path / "cut", **settings)  # a finished one trains no more
    assert all(torch.equal(tensor, state(again)[name]) for name, tensor in state(whole).items())


def test_a_control_without_gates_is_plain_training(tmp_path):
    model, moved = run(tmp_path, gates=False, sink_weight=0.0, activation_weight=0.0)
    assert moved == {name for name, _ in model.named_parameters()}
    assert type(model).__name__ == "Gemma3ForCausalLM"


def test_the_teacher_holds_the_model_where_it_was(tmp_path):
    teacher = build("llama")
    run(tmp_path, "llama", teacher=teacher, fit="kl", sink_weight=0.0, activation_weight=0.0, steps=4)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "kl_nats" in line]
    assert len(lines) == 4
    assert lines[0]["kl_nats"] == pytest.approx(0.0, abs=1e-6)
    assert max(line["kl_nats"] for line in lines) < 0.05


def test_accumulated_passes_weigh_as_one(tmp_path):
    run(tmp_path / "one", steps=2, batch_size=4)
    run(tmp_path / "two", steps=2, batch_size=2, accumulation=2)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert lines[0][0]["grad_norm"] == pytest.approx(lines[1][0]["grad_norm"], rel=1e-4)
    assert lines[0][0]["first_token_attention"] == pytest.approx(lines[1][0]["first_token_attention"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gate_steps": 6}, "gate_steps is 6; it must be at least 0 and below 6"),
        ({"sink_weight": -1.0}, "sink_weight is -1.0"),
        ({"fit": "mse"}, "unknown loss 'mse'"),
        ({"trained": "half"}, "unknown part to train 'half'"),
        ({"gates": False, "trained": "gates"}, "the model has no gates to train"),
    ],
)
def test_bad_settings_are_one_line(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        run(tmp_path, **settings)
    assert "\n" not in str(caught.value)
