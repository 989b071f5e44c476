"""The engine and the Trainer of `compare` train alike: same weights, same batches, same losses."""

import json

import numpy as np
import pytest
import torch
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.optim import AdamWConfig, CosWithWarmup, OptimGroupOverride
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.train_module import TransformerTrainModuleConfig
from worker import Losses

from gated_attention.engine import engine_config, load_weights, undecayed
from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import SIZES
from gated_attention.train.callbacks import MetricsCallback
from gated_attention.train.schedule import Passes
from gated_attention.train.text.blocks import Blocks
from gated_attention.train.text.data import collate
from gated_attention.train.trainer import TrainConfig, train

TINY = SIZES["tiny"]
STEPS, ROWS = 100, 8
CONFIG = TrainConfig(
    steps=STEPS, batch_size=ROWS, learning_rate=4e-3, warmup=0.1, log_every=1, evaluate_every=STEPS,
    checkpoint_every=STEPS,
)  # fmt: skip


def text():
    """Rows of bytes that a small model can learn: a Markov chain over few symbols."""
    random = np.random.default_rng(0)
    follows = random.integers(2, 40, (40, 3))
    rows = np.empty((STEPS * ROWS, TINY.context), np.uint16)
    rows[:, 0] = 2
    for column in range(1, TINY.context):
        rows[:, column] = follows[rows[:, column - 1], random.integers(0, 3, len(rows))]
    return rows


def ours(model, rows, folder):
    train(
        model, CONFIG, train_data=Blocks(rows), validation_data=Blocks(rows[:ROWS]), collate=collate, tokenizer=None,
        output=folder, seed=0, device=torch.device("cpu"), callbacks=[MetricsCallback(folder / "metrics.jsonl")],
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss_nats"] for line in lines if "loss_nats" in line}


def engines(config, weights, rows, folder):
    order = list(Passes(rows, STEPS * ROWS, seed=0))
    rows[order].tofile(folder / "tokens.npy")
    undecayed_group = OptimGroupOverride(params=undecayed(config), opts={"weight_decay": 0.0})
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=ROWS * TINY.context,
        max_sequence_length=TINY.context,
        optim=AdamWConfig(
            lr=CONFIG.learning_rate, betas=(CONFIG.beta1, CONFIG.beta2), weight_decay=CONFIG.weight_decay, fused=True,
            group_overrides=[undecayed_group],
        ),
        max_grad_norm=CONFIG.max_grad_norm,
        scheduler=CosWithWarmup(warmup=CONFIG.warmup_steps, alpha_f=CONFIG.min_learning_rate),
    ).build(engine_config(config).build(init_device="meta"), device=torch.device("cpu"))  # fmt: skip
    load_weights(module.model, weights)
    data = NumpyFSLDatasetConfig(
        paths=[str(folder / "tokens.npy")],
        sequence_length=TINY.context,
        tokenizer=TokenizerConfig(vocab_size=TINY.vocab_size, eos_token_id=0, pad_token_id=1),
        work_dir=str(folder / "work"),
    ).build()
    loader = NumpyDataLoaderConfig(
        global_batch_size=ROWS * TINY.context, seed=0, work_dir=str(folder / "work"), target_device_type="cpu"
    ).build(data)
    loader.shuffle = False  # the order in which the Trainer reads them
    losses = Losses()
    TrainerConfig(
        save_folder=str(folder / "run"),
        max_duration=Duration.steps(STEPS),
        device="cpu",
        metrics_collect_interval=1,
        no_checkpoints=True,
        callbacks={"losses": losses},
    ).build(module, loader).fit()
    return losses.found


@pytest.fixture
def one_thread():
    """Two threads beside another test's processes would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_engine_trains_as_the_trainer_does(tmp_path, one_thread):
    chosen = VARIANTS["sdpa-elementwise"]
    config = make_config(chosen.resize(TINY), chosen.block)
    model = build_model(config, seed=0)
    model.save_pretrained(tmp_path / "weights")
    rows = text()
    (tmp_path / "ours").mkdir()
    (tmp_path / "engine").mkdir()
    expected = ours(model, rows, tmp_path / "ours")
    found = engines(config, tmp_path / "weights", rows, tmp_path / "engine")
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    assert expected[STEPS] < expected[1] - 2
    assert found == pytest.approx(expected, abs=1e-3)
