"""From model folders to page, data and figures; and what is refused on the way."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from gated_attention.analysis.reduction import MassiveActivation
from gated_attention.cli import main
from gated_attention.jobs.analyze import AnalysisPlan, analyze
from gated_attention.jobs.named_model import find_checkpoint
from gated_attention.jobs.text import cut_passages
from gated_attention.models import GatedQwen3Config
from gated_attention.models.build import build_model
from gated_attention.report.analysis.figures import _gate_range
from gated_attention.report.analysis.page import analysis_blocks
from gated_attention.report.analysis.record import as_json, csv_text
from gated_attention.report.analysis.token_view import token_view
from gated_attention.report.blocks import TableBlock, WidgetBlock
from gated_attention.spec import GateSpec
from gated_attention.train.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")
LENGTH = 32


def save(model, folder, tokenizer="bytes"):
    model.save_pretrained(folder)
    if tokenizer:
        load_tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


def gated(gates, vocab_size=257):
    config = GatedQwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, vocab_size=vocab_size, max_position_embeddings=64, gates=gates, bos_token_id=256,
        eos_token_id=256,
    )  # fmt: skip
    return build_model(config, 0)


def gpt2(layers=3):
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=layers, n_head=4, vocab_size=257, n_positions=64, bos_token_id=256, eos_token_id=256
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"file {i}\n" + "".join(f"line {j} of <{i + j}> `x`\n" for j in range(40)))
    return str(folder)


@pytest.fixture
def models(tmp_path):
    arm = tmp_path / "runs" / "study" / "headwise" / "seed0" / "checkpoint-3"
    headwise = save(gated(GateSpec(granularity="headwise")), arm)
    (arm / "trainer_state.json").write_text("{}")
    (arm.parent / "config.json").write_text("{}")  # a study's, not a model's
    assert headwise
    return [save(gpt2(), tmp_path / "plain"), str(arm.parent)]


@pytest.fixture
def analyses(models, text):
    plan = AnalysisPlan(tuple(models), text, num_tokens=256, context=LENGTH)
    return plan, list(analyze(plan, CPU))


def test_the_command_writes_page_data_table_and_figures(models, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["analyze", *models, "--data", text, "--tokens", "256", "--context", "32", "--device", "cpu",
              "--output", str(out)])  # fmt: skip
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "plain" in printed
    assert "headwise seed0" in printed
    assert "analysis.html" in printed
    assert {path.name for path in out.iterdir()} == {
        "analysis.html", "analysis.md", "analysis.json", "measures.csv", "figures"
    }  # fmt: skip
    page = (out / "analysis.html").read_text()
    assert not re.search(r'(src|href)="(?!https://arxiv\.org|#|data:|analysis\.json|measures\.csv)', page)
    assert "NaN" not in page
    for figure in re.findall(r"\((figures/.*?\.svg)\)", (out / "analysis.md").read_text()):
        assert (out / figure).exists()
    assert len(list((out / "figures").glob("*.svg"))) >= 12


def test_json_and_csv_carry_every_number(analyses):
    plan, found = analyses
    content = json.loads(json.dumps(as_json(plan, found), allow_nan=False))
    plain, headwise = content["models"]
    assert (plain["model"], headwise["model"]) == ("plain", "headwise seed0")
    assert plain["num_tokens"] == 256
    assert plain["gates"] == {}
    f_attn = found[1].inspection.measures["f_attn"]
    np.testing.assert_allclose(headwise["measures"]["f_attn"], f_attn, rtol=1e-6)
    assert headwise["summary"]["f_attn"] == pytest.approx(f_attn.mean(), rel=1e-6)
    assert len(headwise["excerpt"]) == LENGTH
    assert np.shape(headwise["gates"]["sdpa"]["excerpt"]) == (2, 4, LENGTH)
    rows = list(csv.DictReader(csv_text(found).splitlines()))
    (row,) = [
        row for row in rows
        if (row["model"], row["measure"], row["layer"], row["head"]) == ("headwise seed0", "f_attn", "1", "2")
    ]  # fmt: skip
    assert float(row["value"]) == pytest.approx(f_attn[1, 2], rel=1e-6)
    assert row["unit"] == "share"
    assert {row["rank"] for row in rows if row["measure"] == "top_activations"} == {"1", "2", "3"}
    assert {row["site"] for row in rows if row["measure"] == "gate_mean"} == {"sdpa"}


def test_every_measure_is_worded_in_docs_and_page(analyses, request):
    plan, found = analyses
    definitions = (request.config.rootpath / "docs" / "analysis.md").read_text()
    from gated_attention.analysis.definitions import ALL, GATE_MEASURES

    page = " ".join(item for block in analysis_blocks(plan, found)
                    for inner in getattr(block, "blocks", [block]) for item in getattr(inner, "items", ()))  # fmt: skip
    measured = {name for one in found for name in one.inspection.measures} | GATE_MEASURES.keys()
    for name, definition in ALL.items():
        assert f"`{name}`" in definitions, name
        assert (definition.title in page) or name not in measured


def test_massive_activations_are_listed_by_place(analyses):
    _, (plain, _) = analyses
    massive = tuple(
        MassiveActivation(layer, position, 7, 1000.0 + layer, 5000.0, 3, 1.0)
        for position, layers in ((0, (1, 3, 4, 5)), (2, (0,)))
        for layer in layers
    )
    plain = replace(plain, inspection=replace(plain.inspection, massive=massive), massive_tokens=tuple("abcde"))
    blocks = analysis_blocks(AnalysisPlan(("plain",)), [plain])
    (table,) = [
        b.table for b in blocks if isinstance(b, TableBlock) and "Channel" in [c.header for c in b.table.columns]
    ]
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows == [
        ["plain", "0", "7", "1, 3 to 5", "1,005", "5", "5,000", "`d`", "100"],
        ["plain", "2", "7", "0", "1,000", "0", "5,000", "`e`", "100"],
    ]


def test_gates_are_drawn_from_closed_to_open(analyses):
    _, found = analyses
    assert _gate_range(found[1:]) == (0.0, 1.0)
    (gate,) = found[1].inspection.gates.values()
    unbounded = replace(gate, edges=np.linspace(-3, 3, 51))
    other = replace(found[1], inspection=replace(found[1].inspection, gates={"sdpa": unbounded}))
    assert _gate_range([found[1], other]) == (None, None)


def test_labels_that_collide_are_written_out(text, tmp_path):
    first, second = (save(gpt2(1), tmp_path / name / "model") for name in "ab")
    plan = AnalysisPlan((first, second), text, num_tokens=64, context=LENGTH, level="summary")
    assert [analysis.label for analysis in analyze(plan, CPU)] == [first, second]


def test_passages_begin_at_starts_and_in_the_middle_of_documents():
    tokenizer = load_tokenizer("bytes")
    documents = Dataset.from_dict({"text": [letter.upper() + letter * 99 for letter in "abcdefgh"]})
    batches = cut_passages(documents, tokenizer, length=40, num_tokens=40 * 6, batch_size=4)
    assert [len(batch.ids) for batch in batches] == [4, 2]
    ids, starts = torch.cat([batch.ids for batch in batches]), torch.cat([batch.at_start for batch in batches])
    assert starts.tolist() == [True, False] * 3
    first = [tokenizer.decode([int(row[0])]) for row in ids]
    assert [letter.isupper() for letter in first] == starts.tolist()
    assert len({letter.lower() for letter in first}) == 6  # no document twice


def test_passages_go_on_with_the_next_document_and_end_with_the_text():
    tokenizer = load_tokenizer("bytes")
    documents = Dataset.from_dict({"text": ["x" * 15] * 4})
    (batch,) = cut_passages(documents, tokenizer, length=30, num_tokens=3000, batch_size=4)
    assert batch.ids.shape == (1, 30)
    assert batch.ids[0, 15] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="too small: 64 tokens, a passage takes 100"):
        cut_passages(documents, tokenizer, length=100, num_tokens=3000, batch_size=4)


def test_the_token_view_shades_by_score_and_escapes_text():
    scores = np.array([[0.0, 0.5, 1.0], [0.2, 0.5, 0.6], [np.nan] * 3])
    view = token_view("a <b>", ["</script>", "\n", "`"], scores)
    assert isinstance(view, WidgetBlock)
    assert "a &lt;b&gt;" in view.markup
    assert view.markup.count("</script>") == 1  # its own
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', view.markup)[1])
    assert data["names"] == ["all layers", "layer 0", "layer 1"]
    np.testing.assert_allclose(data["rows"], [[0.1, 0.5, 0.8], [0, 0.5, 1], [0.2, 0.5, 0.6]])
    assert (data["low"], data["high"]) == (0.0, 1.0)


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    (line,) = [line for line in error if line.startswith("error: ")]
    return line


@pytest.fixture
def refused(text, tmp_path, capsys):
    def run(model, *arguments):
        return fails(["analyze", model, "--data", text, "--device", "cpu", "--output", str(tmp_path / "out"),
                      *arguments], capsys)  # fmt: skip

    return run


def test_bad_input_is_one_line_and_exit_code_2(refused, models, tmp_path, text):
    plain = models[0]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "no model folder '/no/such'" in refused("/no/such")
    assert "no config.json" in refused(text)
    assert "holds no text" in refused(plain, "--data", str(empty))
    assert "context 65 exceeds the 64 positions" in refused(plain, "--context", "65")
    assert "context is 1" in refused(plain, "--context", "1")
    assert "tokens is 0" in refused(plain, "--tokens", "0")
    assert "'deep' is not one of 'full', 'summary'" in refused(plain, "--level", "deep")
    assert "named twice" in refused(plain, plain)
    assert "'tpu' is not one of 'auto', 'cpu', 'cuda'" in refused(plain, "--device", "tpu")


def test_a_tokenizer_that_does_not_fit_is_refused(refused, tmp_path):
    small = save(gated((), vocab_size=100), tmp_path / "small")
    assert "tokenizer does not fit" in refused(small, "--context", "32")
    without = save(gpt2(1), tmp_path / "without", tokenizer=None)
    assert "no tokenizer" in refused(without)


def test_unsupported_models_are_refused(refused, tmp_path, capsys):
    from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

    bloom = BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=32, n_layer=1, n_head=2))
    assert "not supported" in refused(save(bloom, tmp_path / "bloom"), "--context", "32")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=257, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    saved = save(t5, tmp_path / "t5")
    assert "causal language model" in fails(["demo", saved, "--device", "cpu"], capsys)


def test_ablation_is_on_the_page_and_in_the_data(models, text, tmp_path):
    plan = AnalysisPlan(tuple(models), text, num_tokens=256, context=LENGTH, level="summary", ablate=3)
    found = list(analyze(plan, CPU))
    for one in found:
        assert np.isfinite(one.inspection.measures["ablation"]).all()
        assert (one.inspection.measures["ablation_error"] > 0).all()
    blocks = analysis_blocks(plan, found)
    [table] = [b.table for b in blocks if isinstance(b, TableBlock) and b.table.columns[1].header == "Layer"]
    assert len(table.rows) == 16  # eight heads of each
    assert "±" in table.rows[0][3].text
    assert {"ablation", "layer_ablation_error"} <= as_json(plan, found)["models"][0]["measures"].keys()
    with pytest.raises(ValueError, match="takes the means from other passages, and there are 8 in all"):
        list(analyze(replace(plan, ablate=8), CPU))


def test_missing_weights_are_refused(refused, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "torn"
    save(gpt2(1), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.0.attn.c_attn.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights" in refused(str(folder))


def test_an_unwritable_output_is_refused_before_anything_is_read(models, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "choose another --output" in fails(["analyze", models[0], "--output", str(blocked / "x")], capsys)


def test_hub_names_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("gated_attention.jobs.named_model.require_hub", lambda name: None)
    assert find_checkpoint("owner/model").label == "model"
    assert find_checkpoint("owner/model").path == "owner/model"
