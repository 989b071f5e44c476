"""Studies of other architectures than our own: same records, same report, and old records are Qwen3's."""

import json
import re

import pytest
import torch
from finished_arms import report_of, write_arm
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gated_attention.cli import app
from gated_attention.report.study.terminal import Display
from gated_attention.study.grid.estimate import expect
from gated_attention.study.grid.rates import find_settings, point_of
from gated_attention.study.grid.study_file import read_study
from gated_attention.study.plan import make_plan
from gated_attention.study.record import find_results
from gated_attention.train.checkpoints import last_checkpoint

CPU = torch.device("cpu")
CLI = CliRunner()


def planned(output, architecture="llama", **settings):
    return make_plan(
        architecture=architecture, size="tiny", seeds=1, output=output, device=CPU,
        **{"variants": ("baseline", "sdpa-headwise"), **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder and the words of a finished study of two arms."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "text.txt").write_text("".join(f"word{i % 17} is followed by number {i % 5}.\n" for i in range(900)))
    words = [
        "compare", "--architecture", "llama", "--variants", "baseline,sdpa-headwise", "--steps", "3", "--device", "cpu",
        "--batch-size", "2", "--context", "32", "--data", str(folder / "text.txt"), "--output", str(folder),
    ]  # fmt: skip
    done = CLI.invoke(app, words, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert done.exit_code == 0
    assert "Llama, size tiny (0.8M parameters)" in " ".join(done.output.split())
    return folder, words


def test_records_and_report_say_the_architecture(study):
    folder, _ = study
    plain, gated = find_results(folder / "runs" / "compare-llama-tiny")
    assert plain.config["architecture"] == "llama"
    assert (plain.config["model"]["model_type"], gated.config["model"]["model_type"]) == ("llama", "gated_llama")
    assert gated.config["size"]["num_attention_heads"] == 4
    assert gated.config["parameters"]["gates"] == 4 * 128 * 4
    assert {"val_loss_nats", "f_attn", "m_act", "train_loss_nats"} <= plain.measures.keys()
    assert "gate_score_mean" in gated.measures
    assert "gate_score_mean" not in plain.measures
    page = (folder / "reports" / "compare-llama-tiny" / "report.md").read_text()
    assert "Two variants of one Llama decoder (820k parameters" in page
    assert "--architecture llama" in page


def test_checkpoints_load_by_the_auto_class_and_have_a_card(study):
    folder, _ = study
    ids = torch.arange(10)[None]
    for variant, kind in (("baseline", "LlamaForCausalLM"), ("sdpa-headwise", "GatedLlamaForCausalLM")):
        checkpoint = last_checkpoint(folder / "runs" / "compare-llama-tiny" / variant / "seed0")
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert type(model).__name__ == kind
        assert model(input_ids=ids).logits.isfinite().all()
        card = (checkpoint / "README.md").read_text()
        assert f"# {variant}-seed0\n" in card
        assert "| Tokens seen | 192 |" in card
        assert ("G1 sdpa headwise sigmoid" in card) == ("gated" in kind.lower())


def test_analyze_and_evaluate_read_them(study):
    folder, _ = study
    checkpoint = str(folder / "runs" / "compare-llama-tiny" / "sdpa-headwise" / "seed0")
    text = str(folder / "text.txt")
    shared = ["--data", text, "--device", "cpu"]
    done = CLI.invoke(
        app, ["analyze", checkpoint, *shared, "--tokens", "64", "--context", "32", "--output", str(folder / "a")]
    )
    assert done.exit_code == 0, done.output
    found = json.loads((folder / "a" / "analysis.json").read_text())
    assert list(found["models"][0]["gates"]) == ["sdpa"]
    done = CLI.invoke(
        app,
        ["evaluate", checkpoint, *shared, "--tasks", "perplexity", "--output", str(folder / "e"), "--context", "32"],
    )
    assert done.exit_code == 0, done.output


def test_a_finished_study_is_kept_and_another_architecture_refused(study):
    _, words = study
    again = CLI.invoke(app, words)
    assert again.exit_code == 0
    assert again.output.count("kept from an earlier run") == 2
    changed = [word if word != "llama" else "qwen2" for word in words] + ["--name", "compare-llama-tiny"]
    refused = CLI.invoke(app, changed, standalone_mode=False)
    assert re.search("was run with architecture 'llama', not 'qwen2'; choose another name", str(refused.exception))


def test_a_study_goes_on_from_one_of_its_own_architecture(study):
    folder, _ = study
    start = folder / "runs" / "compare-llama-tiny"
    message = "is of architecture 'llama', not 'qwen3'; use --architecture llama"
    with pytest.raises(ValueError, match=message):
        planned(folder, "qwen3", start=start)
    plan = planned(folder, start=start)
    assert all(arm.start is not None for arm in plan.arms)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gemma3", "rope_theta": 5e5}, "'gemma3' has no rotation with one base"),
        ({"qk_norm": False}, "qk_norm = false is of architecture 'qwen3'; 'llama' has the norms of its family"),
        ({"architecture": "opt", "data": {"packing": "documents"}}, "'opt' cannot keep packed documents apart"),
    ],
)
def test_settings_that_a_family_does_not_have_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(tmp_path, **settings)


def test_records_of_before_are_of_qwen3(tmp_path):
    plan = planned(tmp_path, "qwen3")
    arm = plan.arms[0]
    old = arm.resolve()["config"]
    del old["architecture"], old["size"]["ffn_matrices"]
    write_arm(plan.runs, "baseline", 0, config=old)
    (result,) = find_results(plan.runs)
    assert arm.finished() == result
    assert point_of(result)["architecture"] == "qwen3"
    assert "One variant of one Qwen3 decoder" in report_of(plan.runs)
    assert "--architecture" not in report_of(plan.runs)


def test_a_report_says_which_layers_see_a_window(tmp_path):
    for variant in ("baseline", "sdpa-headwise"):
        write_arm(tmp_path / "runs" / "x", variant, 0, config={"architecture": "mistral"})
    page = report_of(tmp_path / "runs" / "x")
    assert "one Mistral decoder (" in page
    assert "every layer sees 1/2 of the context)" in page


def test_a_study_file_crosses_architectures(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text('name = "families"\narchitecture = ["qwen3", "gpt_neox"]\nsteps = 5\n')
    plans = read_study(path).plans(tmp_path, CPU)
    assert [plan.point for plan in plans] == ["architecture-qwen3", "architecture-gpt_neox"]
    ours, theirs = (expect(plan, CPU, 1e10) for plan in plans)
    assert (ours.parameters, theirs.parameters) == (919_040, 892_032)
    for plan in plans:
        config = plan.arms[0].resolve()["config"]
        write_arm(plan.runs, "baseline", 0, config=config)
    runs = [(result, []) for plan in plans for result in find_results(plan.runs)]
    assert [setting.label for setting in find_settings(runs)] == ["architecture gpt_neox", "architecture qwen3"]
    path.write_text('name = "families"\narchitecture = "llama"\nvariants = ["heads-silu"]\n')
    with pytest.raises(ValueError, match="'heads-silu' is SiLU of each head; architecture 'llama' carries gates only"):
        read_study(path)


def test_the_headline_counts_the_model_that_is_trained(tmp_path):
    line = Display(planned(tmp_path, "opt"), CPU, Console(width=200)).headline()
    assert "OPT, size tiny (0.9M parameters)" in line
