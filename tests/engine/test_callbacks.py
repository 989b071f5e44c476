"""A gradient that is not finite changes nothing, a few times; too little data trains nothing."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from olmo_core.train.train_module import TransformerTrainModule
from run_files import write_run

from gated_attention.engine.run.run_file import read_run
from gated_attention.engine.run.token_folders import Tokens
from gated_attention.engine.run.train import Reports, check_trainable, train

STEPS = 5


@pytest.fixture
def tokens(tmp_path):
    np.random.default_rng(0).integers(0, 256, 32 * 64).astype("<u2").tofile(tmp_path / "tokens.npy")
    return Tokens(
        train=(tmp_path / "tokens.npy",), validation=(), dtype="<u2", vocab_size=258, eos_token_id=256, source="noise"
    )


@pytest.fixture
def trained(tmp_path, tokens, monkeypatch, one_thread):
    """Trains with gradients and losses that are not finite in some steps; the lines, and a weight before each step."""
    original, weights, modules = TransformerTrainModule.train_batch, [], []

    def call(poisoned, *changes):
        def train_batch(module, batch, dry_run=False):
            if not dry_run:
                weights.append(module.model.blocks["0"].attention.q_proj.weight.detach().clone())
                modules.append(module)
            original(module, batch, dry_run=dry_run)
            if not dry_run and (step := module.trainer.global_step) in poisoned:
                next(module.model.parameters()).grad[0, 0] = float("nan")
                module.trainer._metrics[step]["train/CE loss"].fill_(float("inf"))

        monkeypatch.setattr(TransformerTrainModule, "train_batch", train_batch)
        lines = []
        run = read_run(write_run(tmp_path), [f"schedule.steps={STEPS}", *changes], on_gpu=False).with_vocabulary(258)
        ended = train(
            run, tokens, tmp_path / "run", Reports(lines.append, lambda step, loss: None, lambda step, found: None)
        )
        return ended, {line["step"]: line["loss_nats"] for line in lines}, weights, modules[-1]

    return call


def test_steps_without_a_finite_gradient_change_neither_weights_nor_moments(trained):
    ended, losses, weights, module = trained({2, 4}, "optimizer.skip_steps=1")
    assert (ended.step, ended.skipped, ended.stopped_by) == (STEPS, 2, None)
    assert [step for step, loss in losses.items() if loss is None] == [2, 4]
    changed = [not before.equal(after) for before, after in pairwise(weights)]
    assert changed == [True, False, True, False]  # by steps 1 to 4
    assert {int(state["step"]) for state in module.optim.state.values()} == {STEPS - 2}
    assert all(torch.isfinite(parameter).all() for parameter in module.model.parameters())


def test_too_many_in_a_row_end_the_run(trained):
    with pytest.raises(
        ValueError, match=r"the gradient of step 4 is not finite, the 2. in a row; lower the learning rate"
    ):
        trained({3, 4}, "optimizer.skip_steps=1")


def test_less_than_a_batch_is_refused(tmp_path, tokens):
    run = read_run(write_run(tmp_path), ["batch.sequences=65"], on_gpu=False).with_vocabulary(258)
    with pytest.raises(ValueError, match="noise has 64 sequences of 32 tokens, fewer than the 65 of a step"):
        check_trainable(run, tokens)
