"""A study of images: the same commands, records, resumption and report as of text, with its own measures and words."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from gated_attention.cli import app
from gated_attention.report.study.page import write_report
from gated_attention.study.grid.estimate import expect
from gated_attention.study.grid.study_file import read_study
from gated_attention.study.plan import make_plan
from gated_attention.study.record import find_results
from gated_attention.study.run import run_study
from gated_attention.train.checkpoints import last_checkpoint

CPU = torch.device("cpu")
CLI = CliRunner()
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "vision.toml"
VARIANTS = ("baseline", "registers-4-sdpa-elementwise")


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(path, count, seed):
    """Images of noise whose class is the half that is bright."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = random.integers(0, 128, (count, 32, 32, 3), np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[slice(0, 16) if label else slice(16, 32)] += 100
    pq.write_table(pa.table({"image": [encoded(one) for one in pixels], "label": labels}), path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train.parquet", 40, 0)
    write_images(folder / "test.parquet", 16, 1)
    return folder


def planned(images, output, **settings):
    train = {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "evaluate_every": 3}
    data = {"source": str(images / "train.parquet"), "validation": str(images / "test.parquet")}
    return make_plan(
        task="vision", size="vit-tiny", seeds=1, output=output, device=CPU,
        **{"variants": VARIANTS, "data": data, "train": train, **settings},
    )  # fmt: skip


class Watcher:
    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def say(self, message):
        pass

    def start(self, arm):
        pass

    def progress(self, arm, progress):
        if (arm.variant.name, progress.step) == self.stop_at:
            raise KeyboardInterrupt

    def finish(self, arm, result, kept):
        pass


@pytest.fixture(scope="module")
def study(images, tmp_path_factory):
    """A finished study of two arms, the second of which was interrupted and taken up again."""
    folder = tmp_path_factory.mktemp("study")
    plan = planned(images, folder)
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, CPU, folder / "cache", Watcher((VARIANTS[1], 5)))
    run_study(plan, CPU, folder / "cache", Watcher())
    write_report(plan.runs, folder / "report")
    return plan, folder


def test_records_have_the_measures_of_images(study):
    plan, _ = study
    plain, gated = find_results(plan.runs)
    assert (plain.config["task"], plain.config["architecture"]) == ("vision", "vit")
    assert plain.tokens_seen == 6 * 8 * 64  # patches
    assert plain.config["images"] == {"train_images": 40, "validation_images": 16, "curve_images": 16}
    assert plain.measures["val_loss_nats"].unit == "nats/image"
    assert plain.measures["accuracy"].n == 16
    assert {"no_op_sink", "broadcast_sink", "attention_cls", "strongest_content", "m_act"} <= plain.measures.keys()
    assert "attention_register" not in plain.measures
    assert len(gated.measures["attention_register"].per_layer) == 4
    assert 0.3 < gated.measures["gate_score_mean"].value < 0.7
    assert abs(gated.config["parameters"]["total"] / plain.config["parameters"]["total"] - 1) < 0.001


def test_an_interrupted_arm_ends_in_the_same_bits(study, images, tmp_path):
    plan, folder = study
    whole = planned(images, tmp_path, variants=VARIANTS[1:])
    (result,) = run_study(whole, CPU, folder / "cache", Watcher())
    again = find_results(plan.runs)[1]
    assert result.measures["val_loss_nats"] == again.measures["val_loss_nats"]
    assert result.measures["train_loss_nats"] == again.measures["train_loss_nats"]


def test_checkpoints_load_by_the_auto_class(study):
    plan, _ = study
    for arm, kind in zip(plan.arms, ("ViT", "GatedRegisterViT"), strict=True):
        checkpoint = last_checkpoint(arm.folder)
        model = AutoModelForImageClassification.from_pretrained(checkpoint)
        assert type(model).__name__ == f"{kind}ForImageClassification"
        assert model.config.id2label == {0: "0", 1: "1"}
        card = (checkpoint / "README.md").read_text()
        assert "pipeline_tag: image-classification" in card
        assert "AutoModelForImageClassification.from_pretrained" in card
        assert "| Held-out accuracy (share) |" in card


def test_the_report_speaks_of_images(study):
    _, folder = study
    page = (folder / "report" / "report.md").read_text()
    assert "Two variants of one ViT (208k parameters" in page
    assert "A token is a patch, 64 per image of 32 x 32 pixels." in page
    assert "16 held-out images" in page
    assert "nats/image" in page
    assert "--task vision" in page
    for words in ("nats/token", "decoder", "held-out text", "PPL", "Beside the paper"):
        assert words not in page
    assert "**No-op sinks**" in page
    assert "**Broadcast sinks**" in page
    assert "**Accuracy**" in page
    assert (folder / "report" / "figures" / "no_op_sink.svg").exists()


def test_analyze_reads_a_checkpoint(study, images):
    plan, folder = study
    words = ["analyze", str(plan.arms[1].folder), "--data", str(images / "test.parquet"), "--text-field", "image"]
    done = CLI.invoke(app, [*words, "--tokens", "256", "--device", "cpu", "--output", str(folder / "a")])
    assert done.exit_code == 0, done.output
    found = json.loads((folder / "a" / "analysis.json").read_text())
    assert list(found["models"][0]["gates"]) == ["sdpa"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size tiny", "unknown size 'tiny'; choose from vit-tiny, vit-s"),
        ("--architecture llama", "architecture 'llama' is of text; task 'vision' trains ViTs"),
        ("--variants heads-silu", "'heads-silu' is SiLU of each head; architecture 'vit' carries gates only"),
        ("--variants nope", "unknown variant 'nope'; choose from baseline"),
        ("--table 1", "table 1 of the paper is of text"),
        ("--tokenizer bytes", "tokenizer is of text; task 'vision' has no such setting"),
        ("--packing documents", "packing is of text"),
        ("--context 32", "context is of text"),
        ("--from runs/x", "from is of text"),
        ("", "task 'vision' needs images"),
        ("--data nowhere", "no Parquet file at 'nowhere'"),
    ],
)
def test_what_images_do_not_have_is_refused_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CLI.invoke(app, ["compare", "--task", "vision", "--device", "cpu", *words.split()])
    assert re.search(re.escape(message), str(done.exception)), done.exception


def test_registers_are_of_images_alone():
    done = CLI.invoke(app, ["compare", "--variants", "registers-4"])
    assert "unknown variant 'registers-4'" in str(done.exception)


def test_the_example_is_five_arms_of_five_seeds(tmp_path):
    (plan,) = read_study(EXAMPLE).plans(tmp_path, CPU)
    assert len(plan.arms) == 25
    found = expect(plan, torch.device("cuda"), 1.8e14)
    assert found.parameters == 5_362_762
    assert found.tokens == 10_000 * 256 * 64
    path = tmp_path / "study.toml"
    path.write_text(read_study(EXAMPLE).resolved([plan]))
    assert read_study(path).plans(tmp_path, CPU) == [plan]
