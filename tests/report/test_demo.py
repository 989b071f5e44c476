"""From models and a prompt to a figure and a table; and what is refused on the way."""

import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gated_attention.cli import main
from gated_attention.models import GatedQwen3Config
from gated_attention.models.build import build_model
from gated_attention.report.analysis.demo import DEFAULT_PROMPT, DemoPlan, demo, draw, parse_layers, summary_table
from gated_attention.report.tables import ABSENT
from gated_attention.spec import GateSpec
from gated_attention.train.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def save(model, folder):
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def gated(tmp_path):
    config = GatedQwen3Config(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, vocab_size=257, max_position_embeddings=128, bos_token_id=256, eos_token_id=256,
        gates=(GateSpec(granularity="headwise"), GateSpec("value")),
    )  # fmt: skip
    return save(build_model(config, 0), tmp_path / "gated")


@pytest.fixture
def plain(tmp_path):
    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=257, n_positions=128, bos_token_id=256, eos_token_id=256
    )
    return save(GPT2LMHeadModel(config), tmp_path / "plain")


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments, "--device", "cpu"])
    return stop.value.code


def test_the_command_draws_a_figure_and_prints_a_table(plain, gated, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert command(plain, gated, "--output", str(tmp_path / "new" / "demo.png")) == 0
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for word in ("plain", "gated", "Attention on the first token", "G1 0.", "G2 0.", "demo.png"):
        assert word in printed


def test_sinks_gates_and_maps_are_the_models_own(plain, gated, tmp_path):
    plan = DemoPlan((plain, gated), prompt="hello $you$", output=tmp_path / "demo.svg")
    readings = demo(plan, CPU)
    assert [reading.label for reading in readings] == ["plain", "gated"]
    for reading, num_layers in zip(readings, (3, 5), strict=True):
        ids = load_tokenizer("bytes")("hello $you$")["input_ids"]
        assert reading.num_tokens == len(ids)
        found = reading.inspection
        assert found.by_layer("f_attn").shape == (num_layers,)
        # The map is whole here, and the measure is its first column's mean over the queries after the first.
        for layer, weights in zip(found.attention_layers, found.attention_maps, strict=True):
            np.testing.assert_allclose(weights[1:, 0].mean(), found.by_layer("f_attn")[layer], atol=1e-3)
            np.testing.assert_allclose(weights.sum(1), 1.0, atol=5e-3)
    without, with_gates = summary_table(readings).rows
    assert without[-1].text == ABSENT
    assert with_gates[-1].text.startswith("G1 0.")
    assert "; G2 0." in with_gates[-1].text
    svg = (tmp_path / "demo.svg").read_text()
    for text in ("Layer 0", "Layer 1", "Layer 2", "Layer 4", "gated (G1)", "gated (G2)", "“hello $you$”", "plain"):
        assert text in svg


def test_the_figure_names_tokens_only_while_they_are_legible(gated, tmp_path):
    def ticks(prompt):
        plan = DemoPlan((gated,), prompt=prompt, layers=(3,), output=tmp_path / "demo.svg")
        figure = draw(plan, demo(plan, CPU))
        maps = [ax for ax in figure.get_axes() if ax.get_title(loc="left") == "Layer 3"]
        return [label.get_text() for label in maps[0].get_yticklabels()], figure

    names, _ = ticks("ab $c")
    assert [name for name in names if name != "<|endoftext|>"][-5:] == ["a", "b", "·", "$", "c"]
    names, figure = ticks(DEFAULT_PROMPT + DEFAULT_PROMPT[:40])
    assert "c" not in names
    assert "maps of the first 64 tokens" in figure.get_suptitle()


def test_layers_are_numbers():
    assert parse_layers(None) is None
    assert parse_layers("3, 0,3") == (0, 3)
    with pytest.raises(ValueError, match=r"layers is '1-3'; give numbers separated by commas"):
        parse_layers("1-3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "no model folder 'nowhere/at/all'"),
        (["MODEL", "MODEL"], "is named twice; name each once"),
        (["MODEL", "--layers", "7"], "layer 7 has no softmax attention to map; choose from 0, 1, 2, 3, 4"),
        (["MODEL", "--layers", "-1"], "layer -1 has no softmax attention"),
        (["MODEL", "--layers", "first"], "layers is 'first'; give numbers"),
        (["MODEL", "--prompt", " "], "the prompt is empty"),
        (["MODEL", "--prompt", "long " * 40], "it reads 2 to 128"),
        (["MODEL", "--output", "demo.pdf"], "demo.pdf is no kind of figure; choose from .png, .svg"),
        (["MODEL", "--output", "MODEL/config.json/demo.png"], "choose another --output"),
    ],
)
def test_bad_requests_are_one_line(arguments, message, gated, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*(argument.replace("MODEL", gated) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("demo.*"))


def test_a_model_without_a_tokenizer_is_refused(gated, tmp_path, capsys):
    for path in (tmp_path / "gated").glob("tokenizer*"):
        path.unlink()
    assert command(gated, "--output", str(tmp_path / "demo.png")) == 2
    assert "no tokenizer beside the model" in capsys.readouterr().err
    assert command(gated, "--tokenizer", "bytes", "--output", str(tmp_path / "demo.png")) == 0


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.json").write_text(json.dumps({}))
    assert command(str(tmp_path / "empty")) == 2
    assert "holds no model" in capsys.readouterr().err
