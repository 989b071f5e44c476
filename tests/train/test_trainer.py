import os

import pytest
import torch
from training import lines, run
from transformers import TrainingArguments as Arguments

from gated_attention.models.build import build_model
from gated_attention.spec import GateSpec
from gated_attention.train import trainer
from gated_attention.train.callbacks import tensorboard_callback
from gated_attention.train.checkpoints import last_checkpoint, tokens_seen
from gated_attention.train.metrics import keep_metrics_until
from gated_attention.train.trainer import TrainConfig


def test_training_lowers_the_loss_and_tells_about_it(tmp_path):
    run(tmp_path, steps=30)
    training = [line for line in lines(tmp_path) if "loss_nats" in line]
    assert training[-1]["loss_nats"] < training[0]["loss_nats"] - 1
    assert [line["step"] for line in training] == list(range(1, 31))
    assert training[9]["tokens"] == 640
    rates = [line["learning_rate"] for line in training]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[0] == pytest.approx(1e-2)  # of one step of warm-up
    assert rates[-1] == pytest.approx(1e-2 * 0.015)


def test_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected, _ = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(broken, stop=5)
    assert last_checkpoint(broken).name == "checkpoint-3"
    resumed, _ = run(broken)
    assert lines(whole) == lines(broken)
    assert expected.tokens_seen == resumed.tokens_seen == tokens_seen(last_checkpoint(broken)) == 8 * 4 * 16
    for left, right in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_finished_run_is_only_loaded(tmp_path, capfd):
    first, _ = run(tmp_path)
    before = lines(tmp_path)
    capfd.readouterr()
    again, _ = run(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert lines(tmp_path) == before
    assert again.tokens_seen == first.tokens_seen == 8 * 4 * 16


def test_one_step_trains(tmp_path):
    trained, _ = run(tmp_path, steps=1)
    fresh = build_model(trained.config, 0)
    assert not torch.equal(trained.lm_head.weight, fresh.lm_head.weight)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_step_makes_all_its_passes_where_the_text_begins_again(tmp_path, accumulation):
    trained, data = run(tmp_path, num_rows=10, steps=4, accumulation=accumulation, checkpoint_every=9)
    asked = data.asked
    assert len(asked) == 4 * accumulation * 4
    assert all(sorted(asked[i : i + 10]) == list(range(10)) for i in range(0, len(asked) - 9, 10))
    assert trained.tokens_seen == len(asked) * 16
    training = [line for line in lines(tmp_path) if "loss_nats" in line]
    assert [line["tokens"] for line in training] == [step * accumulation * 4 * 16 for step in range(1, 5)]


@pytest.mark.trust
def test_resuming_in_the_second_round_over_the_text_changes_nothing(tmp_path):
    settings = {"num_rows": 10, "accumulation": 2}
    whole, _ = run(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop=5, **settings)
    resumed, _ = run(tmp_path / "broken", **settings)
    assert torch.equal(whole.lm_head.weight, resumed.lm_head.weight)
    assert whole.tokens_seen == resumed.tokens_seen == 8 * 8 * 16


def test_fewer_sequences_than_a_pass_takes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch size 4 exceeds .* fills 3 sequences; use a --batch-size of at most 3"):
        run(tmp_path, num_rows=3)
    assert not list(tmp_path.iterdir())


def test_a_held_out_text_of_less_than_a_batch_is_scored_whole(tmp_path):
    run(tmp_path, validation_rows=3)
    assert [line["step"] for line in lines(tmp_path) if "val_loss_nats" in line] == [4, 8]


def test_a_checkpoint_that_counts_no_tokens_is_refused(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 8, "num_input_tokens_seen": 0}')
    with pytest.raises(ValueError, match="does not count its tokens; train this arm again"):
        tokens_seen(tmp_path)


def test_variants_of_one_seed_read_the_same_batches(tmp_path):
    _, plain = run(tmp_path / "a", gates=())
    _, gated = run(tmp_path / "b", gates=GateSpec())
    _, other = run(tmp_path / "c", gates=(), seed=1)
    assert plain.asked == gated.asked
    assert plain.asked != other.asked


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path, monkeypatch):
    def two_gpus(**settings):
        arguments = Arguments(**settings)
        arguments._n_gpu = 2
        return arguments

    _, alone = run(tmp_path / "one", steps=2)
    monkeypatch.setattr(trainer, "Arguments", two_gpus)
    _, data = run(tmp_path / "two", steps=2)
    assert data.asked == alone.asked  # left to itself, the Trainer reads a batch for each


@pytest.mark.parametrize(("cuda_graphs", "mode"), [(True, "reduce-overhead"), (False, None)])
def test_cuda_graphs_reach_the_compiler(cuda_graphs, mode, tmp_path, monkeypatch):
    def compiler(model, **given):
        asked.append(given.get("mode"))
        return model

    asked = []
    monkeypatch.setattr(torch, "compile", compiler)
    run(tmp_path, steps=1, compile=True, cuda_graphs=cuda_graphs)
    assert asked == [mode]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cuda_graphs": True}, "leave compile on, or cuda_graphs out"),
        ({"cuda_graphs": True, "compile": True, "accumulation": 2}, "with cuda_graphs a step is one pass, use 1"),
    ],
)
def test_cuda_graphs_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, batch_size=1, learning_rate=1e-3, **settings)


def test_accumulated_passes_equal_one_large_pass(tmp_path):
    large, _ = run(tmp_path / "a", batch_size=8, steps=3)
    small, _ = run(tmp_path / "b", batch_size=4, accumulation=2, steps=3)
    for left, right in zip(large.parameters(), small.parameters(), strict=True):
        assert torch.allclose(left, right, atol=2e-4)


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((9, "{}"), (10, "{}"), (20, None), (30, "")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


def test_metrics_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    keep_metrics_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("steps", -5), ("batch_size", 0), ("learning_rate", 0.0)])
def test_bad_settings_are_refused_in_one_line(field, value):
    values = {"steps": 1, "batch_size": 1, "learning_rate": 1.0} | {field: value}
    with pytest.raises(ValueError, match=f"{field} is {value}") as error:
        TrainConfig(**values)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_events_are_written(tmp_path):
    callback = tensorboard_callback(tmp_path)
    callback.tb_writer.add_scalar("loss", 1.0, 0)
    callback.tb_writer.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))
