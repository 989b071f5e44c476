"""A small training run on rows of random ids, for tests to start, stop and go on."""

import json

import torch
from transformers import TrainerCallback

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.sizes import SIZES
from gated_attention.spec import BlockSpec, GateSpec
from gated_attention.train.callbacks import MetricsCallback
from gated_attention.train.text.data import collate
from gated_attention.train.trainer import TrainConfig, train

CPU = torch.device("cpu")


class Rows(torch.utils.data.Dataset):
    """Random ids of few tokens, so that there is something to learn, that also remember who asked for them."""

    def __init__(self, num_rows=64):
        self.ids = torch.randint(0, 8, (num_rows, 16), generator=torch.Generator().manual_seed(3))
        self.asked = []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.asked.append(index)
        return {"input_ids": self.ids[index]}


class Stop(TrainerCallback):
    """What a kill looks like from inside: nothing after the step is done."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


HEADWISE = GateSpec(granularity="headwise")


def run(output, gates=HEADWISE, stop=None, seed=0, num_rows=64, validation_rows=8, **settings):
    config = TrainConfig(
        **{"steps": 8, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "evaluate_every": 4}
        | {"checkpoint_every": 3}
        | settings
    )
    model = build_model(make_config(SIZES["tiny"], BlockSpec(gates), num_hidden_layers=2), seed)
    data = Rows(num_rows)
    metrics = MetricsCallback(output / "metrics.jsonl")
    model.tokens_seen = train(
        model,
        config,
        train_data=data,
        validation_data=Rows(validation_rows),
        collate=collate,
        tokenizer=None,
        output=output,
        seed=seed,
        device=CPU,
        callbacks=[metrics, *([Stop(stop)] if stop else [])],
    )
    return model, data


def lines(output):
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in found]
