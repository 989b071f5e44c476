"""Records survive a round trip, a kill and a foreign file."""

import json
import re
import shutil
from dataclasses import asdict
from math import isinf, isnan

import numpy as np
import pytest
import torch
from edited_records import EDITS, OLD

from gated_attention.report.study.page import write_report
from gated_attention.study.plan import make_plan
from gated_attention.study.record import (
    SCHEMA,
    Measure,
    Result,
    find_results,
    read_arrays,
    read_config,
    read_result,
    write_arrays,
    write_json,
    write_result,
)
from gated_attention.train.metrics import read_metrics


def make_result(variant="baseline", seed=0, **measures):
    found = {"val_loss_nats": Measure(1.5, "nats/token", 1000), **measures}
    return Result("study", variant, seed, {"train": {"steps": 3}}, found, 6144, "CPU", versions={"python": "3.11"})


def stored(tmp_path, **changes):
    """A result file with some top-level fields changed, or removed where None."""
    content = {**asdict(make_result()), **changes}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")
    return path


def test_a_result_reads_back_as_it_was_written(tmp_path):
    result = make_result(f_attn=Measure(0.25, "share", 4096, definition=2, per_layer=(0.2, 0.3)))
    write_result(tmp_path, result)
    assert read_result(tmp_path / "result.json") == result


def test_values_that_are_not_finite_read_back(tmp_path):
    write_result(tmp_path, make_result(a=Measure(float("nan"), "1", 1), b=Measure(float("-inf"), "1", 1)))
    measures = read_result(tmp_path / "result.json").measures
    assert isnan(measures["a"].value)
    assert isinf(measures["b"].value)


@pytest.mark.parametrize("schema", [SCHEMA + 1, "1", 0])
def test_another_schema_is_refused(tmp_path, schema):
    with pytest.raises(ValueError, match=rf"schema {schema!r}, this version reads {SCHEMA}") as caught:
        read_result(stored(tmp_path, schema=schema))
    assert "--output" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"measures": None},
        {"variant": None},
        {"unknown_field": 1},
        {"measures": []},
        {"measures": {"val_loss_nats": 1.5}},
        {"measures": {"val_loss_nats": {"value": "low", "unit": "1", "n": 1}}},
        {"measures": {"val_loss_nats": {"value": None, "unit": "1", "n": 1}}},
        {"measures": {"val_loss_nats": {"unit": "1", "n": 1}}},
        {"measures": {"val_loss_nats": {"value": 1.5, "unit": "1", "n": -1}}},
        {"tokens_seen": -1},
        {"seed": -1},
    ],
)
def test_a_file_that_is_not_a_result_is_refused_in_one_line(tmp_path, changes):
    with pytest.raises(ValueError, match="is not a result of this tool") as caught:
        read_result(stored(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_bytes_that_are_not_json_objects_are_refused(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"result\.json"):
        read_result(path)


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"ä": 2})
    assert path.read_text(encoding="utf-8") == '{\n  "ä": 2\n}\n'
    assert [found.name for found in tmp_path.iterdir()] == ["config.json"]


def test_results_are_found_by_variant_and_seed_and_unfinished_arms_are_not(tmp_path):
    for variant, seed in [("b", 10), ("b", 2), ("a", 0)]:
        folder = tmp_path / variant / f"seed{seed}"
        folder.mkdir(parents=True)
        write_result(folder, make_result(variant, seed))
    (tmp_path / "a" / "seed1").mkdir()
    assert [(result.variant, result.seed) for result in find_results(tmp_path)] == [("a", 0), ("b", 2), ("b", 10)]
    assert find_results(tmp_path / "nowhere") == []


def test_metrics_end_before_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "loss_nats": 2.0}\n{"step": 2, "loss_nats": NaN}\n{"step": 3, "lo')
    first, second = read_metrics(path)
    assert first == {"step": 1, "loss_nats": 2.0}
    assert isnan(second["loss_nats"])


def test_arrays_read_back(tmp_path):
    path = tmp_path / "arrays.npz"
    assert read_arrays(path) == {}
    write_arrays(path, {"maps": np.eye(3, dtype=np.float16), "layers": np.array([0, 2])})
    arrays = read_arrays(path)
    assert arrays["maps"].dtype == np.float16
    assert arrays["layers"].tolist() == [0, 2]
    assert [found.name for found in tmp_path.iterdir()] == ["arrays.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", b"text"])
def test_a_broken_archive_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "arrays.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"arrays\.npz is not an archive") as caught:
        read_arrays(path)
    assert "\n" not in str(caught.value)


def test_records_of_an_older_version_still_give_their_table(tmp_path):
    write_report(OLD / "old", tmp_path)
    assert (tmp_path / "table.csv").read_text() == (OLD / "table.csv").read_text()
    config = read_config(OLD / "old" / "baseline" / "seed0" / "config.json")
    assert config["train"]["steps"] == 3


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_edited_by_hand_is_named_by_file_and_field(tmp_path, edit):
    change, file, field = EDITS[edit]
    study = shutil.copytree(OLD / "old", tmp_path / "old")
    change(study / "baseline" / "seed0")
    with pytest.raises(ValueError, match=re.escape(file)) as caught:
        write_report(study, tmp_path / "report")
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "content", ["null", "[]", '{"schema": 1}', '{"schema": 1, "config": null}', '{"schema": 9}', "{"]
)
def test_an_edited_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_config(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_compare_says_why_it_does_not_go_on_with_an_older_version(tmp_path):
    shutil.copytree(OLD / "old", tmp_path / "runs" / "old")
    plan = make_plan(
        name="old", variants=["baseline"], size="tiny", seeds=1, output=tmp_path, device=torch.device("cpu"),
        data={"source": "corpus", "block_size": 32}, train={"steps": 3, "batch_size": 2},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"earlier version, which had no setting data\.packing; choose another name"):
        plan.arms[0].finished()
