"""From a model's folder to data and figures; and what is refused on the way."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from gated_attention.cli import main
from gated_attention.evaluate.benchmarks import BenchmarkScore
from gated_attention.evaluate.loss import held_out_loss
from gated_attention.jobs.evaluation import evaluate
from gated_attention.jobs.evaluation_plan import EvaluationPlan
from gated_attention.jobs.text import encoder, tokenise
from gated_attention.models import GatedQwen3Config
from gated_attention.models.build import build_model
from gated_attention.spec import GateSpec
from gated_attention.train.text.tokenizer import load_tokenizer

CONTEXT = 64


def save(model, folder):
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path):
    config = GatedQwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, vocab_size=257, max_position_embeddings=CONTEXT, gates=GateSpec(granularity="headwise"),
        bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return save(build_model(config, 0), tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [
        {"text": f"{kind} {i}: " + f"word {i} über " * 30, "kind": kind} for kind in ("prose", "code") for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments, "--device", "cpu"])
    shown = capsys.readouterr()
    return stop.value.code, shown.out, shown.err


def test_the_command_writes_data_table_and_figures(model, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    code, printed, _ = run(
        capsys, model, "--data", text, "--field", "kind", "--tasks", "perplexity,length,retrieval,quantization",
        "--yarn", "2", "--rope-theta", "50000", "--multiples", "1,2", "--lengths", "256", "--samples", "1",
        "--depths", "0,1", "--tokens", "800", "--output", str(out),
    )  # fmt: skip
    assert code == 0
    assert {path.name for path in out.iterdir()} == {
        "evaluation.html", "evaluation.md", "evaluation.json", "evaluation.csv", "length.svg", "retrieval.svg"
    }  # fmt: skip
    page = (out / "evaluation.md").read_text().replace(" \\\n ", "")
    for part in ("# Evaluation of model", "context of 64 tokens", "## Results", "### Retrieval", "## Definitions",
                 "## Limitations", "![Retrieval by length and depth](retrieval.svg)",
                 "gated-attention evaluate model --tasks perplexity,length,retrieval,quantization --data text.jsonl "
                 "--field kind --tokens 800 --multiples 1,2 --lengths 256 --yarn 2 --rope-theta 50000 --depths 0,1 "
                 "--samples 1\n", "| prose | plain |"):  # fmt: skip
        assert part in page
    assert (out / "evaluation.html").read_text().count("<svg") == 2
    for part in ("prose", "Bits per byte", "base 50000, YaRN x2", "2x (128)", "passkey 256", "W6A6 token"):
        assert part in printed
    assert re.search(r"layer \d,\s+\w+\.\w+ ", printed)  # names of modules are not cut
    content = json.loads((out / "evaluation.json").read_text())
    rows = list(csv.DictReader((out / "evaluation.csv").read_text().splitlines()))
    assert len(rows) == len(content["numbers"])
    damage = [one for one in content["numbers"] if one["measure"] == "damage"]
    assert [one["rope"] for one in damage] == ["base 50000", "base 50000, YaRN x2"]
    assert all(one["value"] != 0 for one in damage)
    assert {one["item"] for one in content["numbers"] if one["task"] == "perplexity"} == {
        "prose", "code", "average over domains"
    }  # fmt: skip


def test_perplexity_and_quantisation_are_of_the_text_that_was_given(model, text):
    plan = EvaluationPlan(model, source=text, domain_field="kind", num_tokens=10**6, mode="sliding", stride=10**9)
    with pytest.raises(ValueError, match="stride is 1000000000; it must be at least 1 and below the context, 64"):
        evaluate(plan, torch.device("cpu"))
    plan = EvaluationPlan(model, source=text, domain_field="kind", num_tokens=10**6)
    found = evaluate(plan, torch.device("cpu"))
    loss = found.ropes[0].perplexity.domains["code"]
    whole = build_model(GatedQwen3Config.from_pretrained(model), 0)
    tokenizer = load_tokenizer("bytes")
    texts = [json.loads(line)["text"] for line in Path(text).read_text().splitlines() if '"code"' in line]
    ids = torch.tensor([tokenizer.encode(one)[:CONTEXT] for one in texts])
    assert loss.loss_nats == pytest.approx(held_out_loss(whole, [ids]).loss_nats, rel=1e-6)
    assert loss.num_bytes == 4 * (CONTEXT - 1)


def test_bytes_of_tokens_add_up_to_those_of_the_text():
    text = "über <|endoftext|> naïve 日本"
    document = tokenise(load_tokenizer("bytes"), text)
    assert sum(document.num_bytes) == len(text.encode()) == len(document.ids)


@pytest.mark.parametrize("is_fast", [True, False])
def test_retrieval_reads_text_as_everything_else_does(is_fast):
    tokenizer = load_tokenizer("bytes")
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{eos} $A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    encode = encoder(tokenizer if is_fast else Slow(tokenizer))
    text = f"a{eos}b"
    plain = [tokenizer.convert_tokens_to_ids(letter) for letter in text]
    assert encode(text) == plain  # what looks like a special token is text
    assert encode(text, opens=True) == [tokenizer.eos_token_id, *plain]


class Slow:
    """A tokenizer without a Rust core."""

    def __init__(self, tokenizer):
        self.tokenizer, self.all_special_ids = tokenizer, tokenizer.all_special_ids

    def encode(self, text, *, add_special_tokens=True, split_special_tokens, verbose):
        self.tokenizer.backend_tokenizer.encode_special_tokens = split_special_tokens
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def test_retrieval_documents_are_trained_on_as_they_are(tmp_path, capsys):
    path = tmp_path / "retrieval.jsonl"
    with pytest.raises(SystemExit) as stop:
        main(["retrieval-data", str(path), "--tokenizer", "bytes", "--lengths", "256", "--samples", "2"])
    assert stop.value.code == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * 5 * 2
    assert {row["domain"] for row in rows} == {"passkey", "key-value"}
    assert all(re.search(r" \d{5}$", row["text"]) for row in rows)


def test_bad_input_is_one_line_and_exit_code_2(model, text, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    bert = BertLMHeadModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                      vocab_size=257))  # fmt: skip
    small = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=90, n_positions=CONTEXT))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=257, n_positions=CONTEXT))
    bert, small, gpt2 = (save(m, tmp_path / n) for m, n in ((bert, "bert"), (small, "small"), (gpt2, "gpt2")))
    cases = {
        (model, "--tasks", "perplexity,poetry"): "unknown task 'poetry'; choose from perplexity, length",
        (model, "--data", text, "--context", "65"): "65 tokens exceed the 64 positions of",
        (model, "--data", text, "--tasks", "length"): "512 tokens exceed the 64 positions of",
        (model, "--data", str(empty)): "holds no text",
        (model, "--data", text, "--field", "genre"): "has a field 'genre'; give another --field",
        (bert, "--data", text): "is not causal: it reads later tokens",
        (small, "--data", text): "the tokenizer does not fit",
        (gpt2, "--data", text, "--yarn", "2"): "gpt2 has no rotary embedding",
        (model, "--yarn", "x"): "--yarn is 'x'; give numbers separated by commas",
        (model, "--yarn", "2,2"): "yarn 2.0 is named twice; name each once",
        (model, "--mode", "sliding", "--stride", "0"): "stride is 0; it must be at least 1",
        (model, "--stride", "8"): "--stride is for --mode sliding; leave it out",
        (model, "--lengths", "64"): "--lengths is for the tasks retrieval and ruler; leave it out",
        (model, "--filler", text): "--filler is for the task retrieval; leave it out",
        (
            model,
            "--data",
            text,
            "--context",
            "32",
            "--mode",
            "sliding",
            "--stride",
            "32",
        ): "below the context, 32",
        (model, "--tasks", "gsm8k", "--shots", "-1"): "shots is -1; it must be at least 0",
        (model, "--mode", "middle"): "'middle' is not one of 'start', 'sliding'",
        (model, "--tasks", "gsm8k", "--local-dir", str(tmp_path)): "has no gsm8k_test.jsonl",
    }
    for arguments, message in cases.items():
        code, _, errors = run(capsys, *arguments, "--output", str(tmp_path / "out"))
        last = errors.strip().splitlines()[-1]
        assert code == 2, errors
        assert last.startswith("error: "), errors
        assert message in last


def test_benchmarks_are_shown_with_shots_and_the_harness_version(model, tmp_path, capsys, monkeypatch):
    score = BenchmarkScore("gsm8k", "exact_match, strict-match", 0.25, 0.1, 40, 5, "test")
    monkeypatch.setattr("gated_attention.jobs.evaluation.run_benchmark", lambda *args, **options: [score])
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    code, printed, _ = run(capsys, model, "--tasks", "gsm8k", "--output", str(out))
    assert code == 0
    assert re.search(r"0\.2500 ± 0\.1000 +40 +5-shot from test", printed)
    content = json.loads((out / "evaluation.json").read_text())
    assert content["versions"]["lm-eval"] == "0.4.13"
    assert [(one["item"], one["value"]) for one in content["numbers"]] == [("gsm8k", 0.25)]


def test_all_tasks_are_checked_before_the_first_one_runs(model, text, tmp_path, capsys):
    out = tmp_path / "out"
    few = ["--data", text, "--tokens", "64"]
    for tasks, options in (
        ("perplexity,length", ["--multiples", "1,64", "--yarn", "64"]),
        ("perplexity,retrieval", ["--lengths", "8"]),
        ("perplexity,quantization", []),
        ("perplexity,humaneval", []),
    ):
        code, printed, errors = run(capsys, model, "--tasks", tasks, *few, *options, "--output", str(out))
        assert (code, errors.count("\n")) == (2, 1), tasks
        assert "perplexity, plain" not in printed
        assert not out.exists()


def test_what_was_measured_before_an_interruption_is_kept(model, text, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gated_attention.jobs.evaluation.score_samples", interrupt)
    tasks = ["--tasks", "perplexity,retrieval", "--samples", "1", "--depths", "0", "--lengths", "256", "--yarn", "8"]
    code, _, errors = run(capsys, model, *tasks, "--data", text, "--tokens", "200", "--output", str(tmp_path / "out"))
    assert (code, errors) == (130, "stopped\n")
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["is_complete"] is False
    assert {one["task"] for one in content["numbers"]} == {"perplexity"}
