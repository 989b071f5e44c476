"""The mixture of experts that the tests of auxiliary losses train, in one process or in several."""

import json

import torch
from transformers import TrainerCallback

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.penalty import AuxiliaryWeights, GatePenalty
from gated_attention.sizes import SIZES
from gated_attention.spec import BlockSpec, GateSpec
from gated_attention.train.callbacks import MetricsCallback
from gated_attention.train.text.data import collate
from gated_attention.train.trainer import TrainConfig, train

HARD = GateSpec(granularity="headwise", activation="hard_sigmoid")
AUXILIARY = AuxiliaryWeights(load_balance=0.5, router_z=0.1, gate_penalty=GatePenalty(0.3))


def moe_model(block=BlockSpec(HARD), **overrides):  # noqa: B008  frozen
    """A double-precision model whose routers are far from balanced."""
    values = {"num_hidden_layers": 2, "vocab_size": 60, "initializer_range": 0.2} | overrides
    model = build_model(make_config(SIZES["moe-tiny"], block, **values), 0)
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    return model.double().train()


def batch(rows=8):
    """Token ids of 16 columns."""
    return torch.randint(0, 60, (rows, 16), generator=torch.Generator().manual_seed(3))


class Rows(torch.utils.data.Dataset):
    """The rows of a batch as a data set."""

    def __init__(self, rows=32):
        self.ids = batch(rows)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}


class KeepGradients(TrainerCallback):
    """Remembers the gradients of the first step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if state.global_step == 0:
            self.gradients = {
                name.removeprefix("module."): p.grad.detach().clone() for name, p in model.named_parameters()
            }


def train_tiny(output, model=None, device=torch.device("cpu"), **settings):  # noqa: B008
    """First gradients and the metrics of a short run of `train`."""
    values = {"steps": 2, "learning_rate": 1e-3, "log_every": 1, "evaluate_every": 2, "max_grad_norm": 0.0}
    values |= {"checkpoint_every": 2, "auxiliary": AUXILIARY} | settings
    config = TrainConfig(**values)
    keep = KeepGradients()
    train(
        model or moe_model(),
        config,
        train_data=Rows(),
        validation_data=Rows(8),
        collate=collate,
        tokenizer=None,
        output=output,
        seed=0,
        device=device,
        callbacks=[MetricsCallback(output / "metrics.jsonl"), keep],
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {"gradients": keep.gradients, "lines": lines}
