import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gated_attention.device import pick_device
from gated_attention.registry.settings import SETTINGS
from gated_attention.registry.variants import VARIANTS
from gated_attention.report.study.page import write_report
from gated_attention.sizes import SIZES
from gated_attention.study.plan import make_plan
from gated_attention.study.record import find_results, read_arrays
from gated_attention.study.run import run_study
from gated_attention.study.samples import read_samples
from gated_attention.train.checkpoints import last_checkpoint
from gated_attention.train.text.data import load_data

CPU = torch.device("cpu")
MEASURED_BY_CLOCK = {"train_tokens_per_s", "peak_memory_gib"}


class Watcher:
    """An observer that remembers, and can stop a run."""

    def __init__(self, stop_at=None):
        self.stop_at, self.started, self.kept, self.messages = stop_at, [], [], []

    def say(self, message):
        self.messages.append(message)

    def start(self, arm):
        self.started.append((arm.variant.name, arm.seed))

    def progress(self, arm, progress):
        if (arm.variant.name, arm.seed, progress.step) == self.stop_at:
            raise KeyboardInterrupt

    def finish(self, arm, result, kept):
        if kept:
            self.kept.append((arm.variant.name, arm.seed))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = [f"word{i % 17} is followed by number {i % 5}.\n" for i in range(400)]
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"file {i}\n" + "".join(words[i:]))
    return folder


@pytest.fixture
def plan(tmp_path, corpus):
    def make(output="out", variants=("baseline", "sdpa-headwise"), **settings):
        train = {"steps": 6, "batch_size": 2, "checkpoint_every": 2, "log_every": 1, "evaluate_every": 3}
        train |= settings.pop("train", {})
        return make_plan(
            variants=variants,
            size="tiny",
            seeds=settings.pop("seeds", 1),
            output=tmp_path / output,
            device=CPU,
            data={"source": str(corpus), "block_size": 64, "max_validation_tokens": 1024},
            train=train,
            **settings,
        )

    return make


def run(plan, tmp_path, watcher=None):
    return run_study(plan, CPU, tmp_path / "cache", watcher or Watcher())


def numbers(results):
    return {
        (result.variant, result.seed): {
            name: (measure.value, measure.per_layer)
            for name, measure in result.measures.items()
            if name not in MEASURED_BY_CLOCK
        }
        for result in results
    }


def test_every_arm_leaves_a_whole_record(plan, tmp_path):
    study = plan(seeds=2)
    results = run(study, tmp_path)
    assert [(r.variant, r.seed) for r in results] == [
        ("baseline", 0),
        ("sdpa-headwise", 0),
        ("baseline", 1),
        ("sdpa-headwise", 1),
    ]
    assert find_results(study.runs) == sorted(results, key=lambda r: (r.variant, r.seed))
    gated = results[1]
    assert gated.tokens_seen == 6 * 2 * 64
    assert gated.config["parameters"]["gates"] == 4 * 128 * 6
    assert gated.config["parameters"]["total"] == results[0].config["parameters"]["total"]
    assert gated.config["model"]["intermediate_size"] == SIZES["tiny"].intermediate_size - 2
    assert gated.measures["val_loss_nats"].unit == "nats/token"
    assert gated.measures["val_perplexity"].value == pytest.approx(np.exp(gated.measures["val_loss_nats"].value))
    assert gated.measures["f_attn_uniform"].value == pytest.approx(np.mean(1 / np.arange(2, 65)))
    assert len(gated.measures["m_act"].per_layer) == 4
    assert 0.3 < gated.measures["gate_score_mean"].value < 0.7
    assert "gate_score_mean" not in results[0].measures
    folder = study.runs / "sdpa-headwise" / "seed0"
    arrays = read_arrays(folder / "arrays.npz")
    assert arrays["gate_histogram_sdpa"].shape == (4, 50)
    assert arrays["attention_maps"].shape == (3, 48, 48)
    assert (folder / "checkpoint-6" / "model.safetensors").exists()
    samples, others = (
        read_samples(study.runs / name / "seed0" / "samples.json") for name in ("sdpa-headwise", "baseline")
    )
    assert len(samples) == 3
    assert [one.prompt + one.held_out for one in samples] == [one.prompt + one.held_out for one in others]
    assert all(30 < len(one.prompt) <= 32 for one in samples)  # half a block of bytes, without the ends of documents
    card = (folder / "checkpoint-6" / "README.md").read_text()
    assert "# sdpa-headwise-seed0\n" in card
    assert "| Tokens seen | 768 |" in card
    assert f"| Held-out loss (nats/token) | {gated.measures['val_loss_nats'].value:.4g} |" in card
    assert "| Mean gate score" in card
    assert str(tmp_path) not in card
    assert json.loads((folder / "config.json").read_text())["variant"] == "sdpa-headwise"


def test_finished_arms_are_kept(plan, tmp_path):
    first = run(plan(variants=("baseline",)), tmp_path)
    watcher = Watcher()
    again = run(plan(), tmp_path, watcher)
    assert again[:1] == first
    assert watcher.kept == [("baseline", 0)]
    assert watcher.started == [("sdpa-headwise", 0)]


def test_interrupted_study_ends_as_an_uninterrupted_one(plan, tmp_path):
    whole = run(plan("whole"), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(plan("broken"), tmp_path, Watcher(stop_at=("sdpa-headwise", 0, 5)))
    watcher = Watcher()
    resumed = run(plan("broken"), tmp_path, watcher)
    assert watcher.kept == [("baseline", 0)]
    assert numbers(resumed) == numbers(whole)


@pytest.mark.trust
def test_run_killed_between_training_and_measuring_is_measured(plan, tmp_path):
    study = plan(variants=("sdpa-headwise",))
    whole = run(study, tmp_path)
    (study.runs / "sdpa-headwise" / "seed0" / "result.json").unlink()
    assert numbers(run(study, tmp_path)) == numbers(whole)


def test_other_settings_do_not_mix_with_what_is_there(plan, tmp_path):
    run(plan(variants=("baseline",)), tmp_path)
    watcher = Watcher()
    with pytest.raises(ValueError, match=r"train\.steps 6, not 7; choose another name") as error:
        run(plan(train={"steps": 7}), tmp_path, watcher)
    assert "\n" not in str(error.value)
    assert watcher.started == []


def test_arms_of_one_study_read_one_text(plan, corpus, tmp_path):
    run(plan(variants=["baseline"]), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(plan(), tmp_path, Watcher(("sdpa-headwise", 0, 5)))
    for path in corpus.iterdir():  # written again as they were
        path.write_text(path.read_text())
    path = corpus / "3.txt"
    text = path.read_text()
    path.write_text(text.replace("word3", "word4", 1))  # as long as before
    for variants in (["baseline", "sdpa-elementwise"], ["sdpa-headwise"]):
        with pytest.raises(
            ValueError, match=r"seed0 was trained on other text than .*corpus holds now; bring that back"
        ):
            run(plan(variants=variants), tmp_path)
    assert not (tmp_path / "out" / "runs" / "compare-tiny" / "sdpa-elementwise").exists()
    path.write_text(text)
    assert len(run(plan(), tmp_path)) == 2


def test_unfinished_arm_of_other_settings_is_refused(plan, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(plan(), tmp_path, Watcher(stop_at=("baseline", 0, 3)))
    with pytest.raises(ValueError, match=r"train\.learning_rate"):
        run(plan(train={"learning_rate": 1e-5}), tmp_path)


@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_foreign_records_are_refused_and_left_alone(plan, tmp_path, name):
    study = plan()
    folder = study.runs / "sdpa-headwise" / "seed0"
    folder.mkdir(parents=True)
    (folder / name).write_text('{"schema": 99}')
    watcher = Watcher()
    with pytest.raises(ValueError, match="schema"):
        run(study, tmp_path, watcher)
    assert watcher.started == []
    assert (folder / name).read_text() == '{"schema": 99}'


def test_output_that_cannot_be_written(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*; choose another --output"):
        run(plan("file"), tmp_path)


def test_several_gates_are_measured_as_one_number_and_drawn_by_site(plan, tmp_path):
    (result,) = run(plan(variants=("sdpa-value-elementwise",), train={"steps": 2}), tmp_path)
    arrays = read_arrays(tmp_path / "out" / "runs" / "compare-tiny" / result.variant / "seed0" / "arrays.npz")
    assert {"gate_histogram_sdpa", "gate_histogram_value"} <= set(arrays)
    assert 0 < result.measures["gate_score_mean"].value < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": ["nope"]}, "unknown variant 'nope'; choose from baseline"),
        ({"variants": []}, "at least one variant"),
        ({"variants": ["baseline", "baseline"]}, "named twice"),
        ({"size": "huge"}, "unknown size 'huge'; choose from tiny"),
        ({"seeds": 0}, "seeds is 0"),
        ({"train": {"steps": -1}}, "steps is -1"),
        ({"data": {"block_size": 1}}, "block_size is 1"),
    ],
)
def test_bad_plans_are_refused_in_one_line(settings, message):
    values = {"variants": ["baseline"], "size": "tiny", "seeds": 1, "output": Path(), "device": CPU} | settings
    with pytest.raises(ValueError, match=message) as error:
        make_plan(**values)
    assert "\n" not in str(error.value)


def test_defaults_follow_the_size():
    plan = make_plan(variants=["baseline"], size="s", seeds=1, output=Path(), device=CPU)
    assert (plan.train.steps, plan.data.block_size, plan.data.tokenizer) == (3000, 1024, "bpe-16384")
    assert (plan.train.precision, plan.train.compile) == ("float32", False)
    on_gpu = make_plan(variants=["baseline"], size="s", seeds=1, output=Path(), device=torch.device("cuda"))
    assert (on_gpu.train.precision, on_gpu.train.compile) == ("bfloat16", True)


def test_every_size_has_settings_and_every_variant_a_matching_ffn():
    assert set(SETTINGS) == set(SIZES)
    assert all(name == variant.name for name, variant in VARIANTS.items())


def test_devices():
    assert pick_device("cpu") == CPU
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == CPU
        with pytest.raises(ValueError, match="use --device cpu"):
            pick_device("cuda")


def continued(plan, start, corpus, **changes):
    made = plan(output="out", start=start, rope_theta=1e6, train={"steps": 2, "learning_rate": 1e-9}, **changes)
    return replace(made, data=replace(made.data, block_size=128))


def test_a_study_goes_on_from_another_at_a_new_length_and_base(plan, corpus, tmp_path):
    first = plan(variants=("sdpa-headwise",), train={"steps": 2})
    run(first, tmp_path)
    longer = continued(plan, first.runs, corpus, variants=("sdpa-headwise",))
    assert longer.name == "compare-tiny-64"
    assert longer.data.tokenizer == str(last_checkpoint(first.arms[0].folder))
    (result,) = run(longer, tmp_path)
    before, after = (
        AutoModelForCausalLM.from_pretrained(last_checkpoint(study.arms[0].folder)) for study in (first, longer)
    )
    assert after.config.rope_parameters["rope_theta"] == 1e6
    assert before.config.rope_parameters["rope_theta"] == 10_000
    assert after.config.max_position_embeddings == 128
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(old, new, atol=1e-6, rtol=0, msg=name)
    assert result.config["start"] == longer.data.tokenizer
    later = continued(plan, first.runs, corpus, variants=("sdpa-headwise",), first_seed=1)
    with pytest.raises(ValueError, match=r"sdpa-headwise/seed1 has no checkpoint to start from"):
        run(later, tmp_path)
    again = plan(output="out", start=longer.runs, variants=("sdpa-headwise",), name="again")
    loaded = load_data(again.data, tmp_path / "cache")
    assert again.arms[0].model_config(loaded).rope_parameters["rope_theta"] == 1e6  # kept where none is named
    with pytest.raises(ValueError, match=r"was run with start .*, not None"):
        replace(longer, start=None).arms[0].finished()


def test_a_start_that_does_not_fit_is_refused_before_training(plan, corpus, tmp_path):
    first = plan(variants=("sdpa-headwise",), train={"steps": 2})
    run(first, tmp_path)
    watcher = Watcher()
    with pytest.raises(ValueError, match=r"baseline/seed0 has no checkpoint to start from; give --from a study"):
        run(continued(plan, first.runs, corpus, variants=("sdpa-headwise", "baseline")), tmp_path, watcher)
    assert not watcher.started
    small = continued(plan, first.runs, corpus, variants=("sdpa-headwise",))
    with pytest.raises(ValueError, match="holds another model than this arm's; use the --size"):
        run(replace(small, size=SIZES["xs"]), tmp_path)


def test_text_that_fills_less_than_a_pass_is_refused_before_training(plan, tmp_path):
    watcher = Watcher()
    with pytest.raises(ValueError, match=r"batch size 100000 exceeds .* use a --batch-size of at most \d+") as error:
        run(plan(train={"batch_size": 100_000}), tmp_path, watcher)
    assert "\n" not in str(error.value)
    assert not watcher.started


def test_a_small_corpus_trains_with_the_size_s_own_settings(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    for i in range(38):
        (folder / f"{i}.txt").write_text(f"file {i}\n" + f"its line is number {i}.\n" * 44)
    study = make_plan(
        variants=["baseline"], size="tiny", seeds=1, output=tmp_path, device=CPU,
        data={"source": str(folder)}, train={"steps": 2, "evaluate_every": 1},
    )  # fmt: skip
    (result,) = run(study, tmp_path)
    assert result.tokens_seen == 2 * 8 * 256
    about = result.config["text"]
    assert about["validation_kept_tokens"] == result.measures["val_loss_nats"].n // 255 * 256
    assert about["validation_documents"] + about["train_documents"] == 38
    with (study.arms[0].folder / "metrics.jsonl").open() as lines:
        assert [line["step"] for line in map(json.loads, lines) if "val_loss_nats" in line] == [1, 2]


def test_documents_kept_apart_are_trained_and_measured_and_reported(plan, tmp_path):
    stream, apart = plan(variants=("baseline",)), plan(variants=("baseline",), name="apart")
    source = tmp_path / "short.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} is the number."}) + "\n" for i in range(400)))
    stream, apart = (
        replace(study, data=replace(study.data, source=str(source), packing=packing))
        for study, packing in ((stream, "stream"), (apart, "documents"))
    )
    results = [run(study, tmp_path)[0] for study in (stream, apart)]
    assert results[0].tokens_seen == results[1].tokens_seen
    assert results[0].measures["val_loss_nats"].value != results[1].measures["val_loss_nats"].value
    write_report(apart.runs, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "the documents in a sequence kept apart" in text
    assert "a token sees only its own document" in text
    assert "--packing documents" in text


def test_the_parameters_of_a_record_are_those_of_the_model(plan, tmp_path):
    study = plan(variants=("sdpa-headwise",), train={"steps": 1})
    study = replace(study, data=replace(study.data, tokenizer="bpe-270"))
    (result,) = run(study, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(last_checkpoint(study.arms[0].folder))
    assert model.config.vocab_size == 270
    assert result.config["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    watcher = Watcher()
    assert run(study, tmp_path, watcher) == [result]
    assert watcher.kept == [("sdpa-headwise", 0)]
