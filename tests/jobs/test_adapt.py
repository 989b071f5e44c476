"""`adapt` from the command line: a model, a page, records, resuming, and bad input in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers as tf
from test_sink_losses import SLIDING, WIDTHS

from gated_attention import GatedQwen3Config, GatedQwen3ForCausalLM
from gated_attention.cli import main
from gated_attention.train.text.tokenizer import load_tokenizer

SMALL = ["--steps", "6", "--batch-size", "2", "--context", "32", "--tokens", "256", "--device", "cpu"]
SMALL += ["--checkpoint-every", "6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapt")
    (root / "text").mkdir()
    for part in range(6):
        lines = "".join(f"{part} and {i} is {part + i}\n" for i in range(120))
        (root / "text" / f"{part}.txt").write_text(lines)
    torch.manual_seed(0)
    shape = WIDTHS | {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": 256}
    tokenizer = load_tokenizer("bytes")
    for name, model in {
        "gemma": tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**shape | SLIDING)),
        "llama": tf.LlamaForCausalLM(tf.LlamaConfig(**shape)),
        "gpt2": tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=16, eos_token_id=256)
        ),
        "bert": tf.BertLMHeadModel(tf.BertConfig(**shape, is_decoder=False)),
        "sinks": tf.GptOssForCausalLM(tf.GptOssConfig(**shape | {"num_local_experts": 4, "head_dim": 8})),
        "qwen3": GatedQwen3ForCausalLM(GatedQwen3Config(**shape | {"head_dim": 8})),
    }.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


DOUBT = "is the tokenizer the model's own?"  # of a model that was never trained


def words(place, output, *options, model="llama"):
    return ["adapt", str(place / model), "--data", str(place / "text"), "--output", str(output), *SMALL, *options]


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    printed = capsys.readouterr()
    assert stop.value.code == code, printed.err
    return printed.err if code else printed.out


@pytest.fixture(scope="module")
def adapted(place):
    """All arms of a Llama, whose RoPE allows YaRN."""
    output = place / "adapted"
    with pytest.raises(SystemExit) as stop:
        main(words(place, output, "--window", "8"))
    assert stop.value.code == 0
    return output


def test_it_leaves_models_a_page_and_records(adapted, capsys):
    assert sorted(path.name for path in adapted.iterdir()) == [
        "figures", "model", "records", "report.html", "report.md", "table.csv",
    ]  # fmt: skip
    model = tf.AutoModelForCausalLM.from_pretrained(adapted / "model")
    assert model.config.model_type == "gated_llama"
    assert all(layer.self_attn.g_proj.weight.abs().max() > 0 for layer in model.model.layers)
    assert tf.AutoTokenizer.from_pretrained(adapted / "model").eos_token_id == 256
    page = (adapted / "report.md").read_text()
    for part in ("| original |", "| control |", "| penalties |", "| gated |", "YaRN", "1 seed: no evidence yet", DOUBT):
        assert part in page
    assert "paired by seed" in (adapted / "report.html").read_text()
    found = json.loads((adapted / "records" / "gated" / "seed0" / "result.json").read_text())
    assert found["tokens_seen"] == 6 * 2 * 32
    assert found["measures"].keys() == {
        "loss_nats", "frequency_nats", "num_tokens", "f_attn_uniform", "f_attn", "sink_rate", "m_act", "w8a8_loss_nats",
        "w8a8_nats", "late_loss_nats", "no_first_nats", "window_nats", "yarn_nats",
    }  # fmt: skip
    assert found["by_position"].keys() == {"plain", "YaRN x4"}
    assert found["missing"] == {}


def test_the_same_command_trains_nothing_again(adapted, place, capsys):
    before = (adapted / "report.html").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in adapted.glob("records/*/*/result.json")}
    assert len(times) == 4
    printed = run(capsys, *words(place, adapted, "--window", "8"))
    assert "training" not in printed
    assert f"model: {adapted / 'model'}" in printed
    assert f"page: {adapted / 'report.html'}" in printed
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (adapted / "report.html").read_bytes() == before


def test_report_writes_the_page_again_from_the_records(adapted, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(adapted / "records", moved / "records")
    assert "report.html" in run(capsys, "report", str(moved))
    for name in ("report.md", "report.html", "table.csv", "figures/f_attn.svg", "figures/position.svg"):
        assert (moved / name).read_bytes() == (adapted / name).read_bytes()


def test_the_printed_command_repeats_the_settings(adapted, place, tmp_path, capsys):
    (command,) = (adapted / "report.md").read_text().split("```sh\n")[1:]
    printed = command.split("```")[0].replace("\\\n", " ").split()[1:]
    assert printed[1:4] == ["llama", "--data", "text"]
    plan = [
        printed[0],
        str(place / "llama"),
        "--data",
        str(place / "text"),
        *printed[4:],
        "--output",
        str(adapted),
        "--device",
        "cpu",
    ]
    assert "training" not in run(capsys, *plan)


def test_a_family_without_rope_says_that_it_cannot_be_stretched(place, tmp_path, capsys):
    run(
        capsys,
        *words(place, tmp_path / "out", "--arms", "gated", "--context", "16", "--sink-weight", "0", model="gpt2"),
    )
    assert "gpt2 has no rotary embedding" in (tmp_path / "out" / "report.md").read_text()


def test_a_family_with_two_rotary_embeddings_is_stretched_where_it_sees_the_whole_context(place, tmp_path, capsys):
    run(capsys, *words(place, tmp_path / "out", "--arms", "gated", model="gemma"))
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Not measured" not in page
    assert "The reference is `original`" in page
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.model_type == "gated_gemma3_text"


@pytest.mark.trust
def test_a_killed_run_ends_as_one_that_was_not(place, tmp_path):
    options = ["--arms", "gated", "--steps", "40", "--checkpoint-every", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(output):
        return [sys.executable, "-m", "gated_attention", *words(place, output), *options]

    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "cut"), env=environment, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "cut").glob("checkpoints/gated-seed0/checkpoint-*/.whole.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "model").exists()
    subprocess.run(command(tmp_path / "cut"), env=environment, check=True, capture_output=True)
    names = ("model/model.safetensors", "records/gated/seed0/result.json", "records/original/seed0/result.json")
    for name in (*names, "table.csv", "report.md"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "cut").glob("checkpoints/*"))


def test_other_settings_need_another_folder(adapted, place, capsys):
    error = run(capsys, *words(place, adapted, "--window", "8", "--sink-weight", "2"), code=2)
    assert "was made with train.sink_weight 1.0, not 2.0; choose another --output" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "gated,plain"], "unknown arm 'plain'"),
        (["--variant", "baseline"], "variant 'baseline' is"),
        (["--variant", "sdpa-headwise-bias"], "unknown variant"),
        (["--context", "128"], "context 128 exceeds the 64 positions"),
        (["--window", "40"], "window is 40"),
        (["--gate-steps", "6"], "gate_steps is 6"),
        (["--layers", "7"], "no attention in layer 7"),
        (["--layers", "0-99999999999"], "--layers is 99999999999; it must be below 10,000"),
        (["--gate-learning-rate", "1e9"], "gate_learning_rate is 1000000000.0"),
        (["--batch-size", "100000"], "exceeds the training text"),
        (["--data", "nowhere"], "nowhere"),
        (["--learning-rate", "0"], "learning_rate is 0.0"),
        (["--seeds", "0"], "seeds is 0"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, capsys, options, message):
    error = run(capsys, *words(place, tmp_path / "out", *options), code=2)
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt2", "no attention dropout, 0.1 was asked for; use --sink-weight 0"),  # the context is 16, its positions
        ("bert", "is not causal: it reads later tokens; give a decoder"),
        ("sinks", "first-token attention does not know s_aux"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_it_is_measured(place, tmp_path, capsys, model, message):
    command = words(place, tmp_path / "out", model=model)
    place_of_context = command.index("--context")
    error = run(capsys, *command[:place_of_context], *command[place_of_context + 2 :], code=2)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_text_that_changed_since_is_refused(adapted, place, capsys):
    path = place / "text" / "3.txt"
    text = path.read_text()
    path.write_text(text.replace("119", "911"))
    error = run(capsys, *words(place, adapted, "--window", "8", "--seeds", "2"), code=2)
    path.write_text(text)
    assert "was made from other text than" in error


def test_a_model_of_compare_without_gates_gets_its_own(place, tmp_path, capsys):
    options = ("--arms", "gated", "--variant", "sdpa-headwise")
    run(capsys, *words(place, tmp_path / "out", *options, model="qwen3"))
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert type(model) is GatedQwen3ForCausalLM
    assert [gate.scale for gate in model.config.gates] == [2.0]
    assert all(layer.self_attn.g_proj.weight.any() for layer in model.model.layers)
    assert "leave out --layers" in run(
        capsys, *words(place, tmp_path / "other", *options, "--layers", "0", model="qwen3"), code=2
    )


def test_a_model_with_gates_is_refused(adapted, place, tmp_path, capsys):
    error = run(capsys, *words(place, tmp_path / "out", model="adapted/model"), code=2)
    assert "has gates already" in error
