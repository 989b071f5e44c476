"""Inputs to the command line that no command can use, as data: arguments with the places that `Places` makes.

A word of the form `{name}` stands for one of these places; `{out}` is where a command would write.
"""

from collections.abc import Iterator

NUMBERS = ("", "x", "nan", "1e999", "0x10", "1,2")
WHOLE = (*NUMBERS, "1.5", "-1", "99999999999999999999")

BROKEN_MODELS = (
    *("nowhere", "empty", "file", "no_config", "config_cut", "config_list", "config_other", "weights_cut"),
    *("weights_empty", "weights_missing", "tensor_missing", "tensor_shape", "no_tokenizer", "tokenizer_cut"),
)

BROKEN_DATA = (
    *(
        "nowhere",
        "empty",
        "blank",
        "unknown",
        "cut.jsonl.gz",
        "cut.jsonl.zst",
        "cut.jsonl.xz",
        "bytes.txt",
        "list.jsonl",
    ),
    *("fieldless.jsonl", "numbers.jsonl", "broken.jsonl", "broken.parquet", "tiny"),
)

BAD_NAMES = (
    *("", " ", ".", "..", "../x", "../../x", "a/b", "/tmp/x", "-x", ".hidden", "a\0b", "a\nb", "a\\b", " a", "a "),
    *("x" * 300, "\x1b[31m", "\ud800", "~/x/y"),
)


def compare() -> Iterator[list[str]]:
    """Arguments of `compare`."""
    for option in ("--steps", "--seeds", "--context", "--batch-size", "--accumulation"):
        yield from ([option, value] for value in (*WHOLE, "0"))
    yield from (["--learning-rate", value] for value in (*NUMBERS, "0", "-1", "-inf", "1e9"))
    yield from (["--weight-decay", value] for value in (*NUMBERS, "-1", "-inf", "1e9"))
    yield from (["--rope-theta", value] for value in (*NUMBERS, "0", "1", "-5", "1e300"))
    yield from (["--table", value] for value in (*WHOLE, "0", "5", "7"))
    yield from (["--size", value] for value in ("", "huge", "Tiny", "tiny ", "../tiny", "15A2B", "tiny,xs"))
    yield from (
        ["--variants", value]
        for value in (
            "",
            ",",
            "nope",
            "baseline,nope",
            "baseline,baseline",
            "Baseline",
            "baseline;nope",
            "../x",
            "a\0b",
        )
    )
    yield from (["--name", name] for name in BAD_NAMES)
    yield from (["--device", value] for value in ("", "tpu", "CPU", "cuda:99", "mps"))
    yield from (
        ["--tokenizer", value]
        for value in (
            "",
            "bpe-10",
            "bpe-0",
            "bpe-x",
            "bpe--5",
            "{nowhere}",
            "{empty}",
            "{file}",
            "a/b/c",
            "no-such-name",
        )
    )
    yield from (["--data", f"{{{name}}}"] for name in BROKEN_DATA)
    yield from (["--data", value] for value in ("", "http://example.org/x", "owner/name", "a\0b", "y" * 5000))
    yield from (["--validation", f"{{{name}}}"] for name in ("nowhere", "empty", "blank", "broken.jsonl"))
    yield ["--text-field", "nope", "--data", "{good.jsonl}"]
    yield from (["--output", value] for value in ("{file}", "{file}/x", "/proc/nope", "{dir}/" + "x" * 300, "a\0b"))
    yield from (["--from", value] for value in ("{nowhere}", "{file}", "{empty}", "{study}"))
    yield ["--table", "1", "--variants", "baseline"]
    yield from (["--nope"], ["--steps"], ["extra"], ["--compile=yes"], ["--bos", "yes"], ["--batch-size", "100000"])


def report() -> Iterator[list[str]]:
    """Arguments of `report`; edited records have a table of their own, `edited_records`."""
    yield from ([], ["{nowhere}"], ["{file}"], ["{empty}"], ["a\0b"], ["{study}", "extra"], ["{study}", "--output"])
    yield from (["{study}", "--output", value] for value in ("{file}", "{file}/x", "/proc/nope", "{dir}/" + "x" * 300))


def variants() -> Iterator[list[str]]:
    """Arguments of `variants`."""
    yield from (
        ["nope"],
        [""],
        ["baseline", "sdpa-headwise"],
        ["baseline", "--size", "huge"],
        ["baseline", "--size", ""],
        ["--size", "tiny"],
        ["--json=1"],
    )


def analyze() -> Iterator[list[str]]:
    """Arguments of `analyze`."""
    yield []
    yield from ([f"{{{name}}}"] for name in BROKEN_MODELS)
    yield from (["{model}", "{model}"], ["", "{model}"], ["a/b/c"], ["a\0b"])
    for option, values in {
        "--tokens": (*WHOLE, "0", "1"), "--context": (*WHOLE, "0", "1", "4096"), "--level": ("", "all"),
        "--device": ("tpu",), "--tokenizer": ("{nowhere}", "{empty}", "bpe-300"),
        "--data": ("{nowhere}", "{empty}", "{tiny}"), "--output": ("{file}", "/proc/nope"),
    }.items():  # fmt: skip
        yield from (["{model}", option, value] for value in values)

    yield ["{model}", "--data", "{good.jsonl}", "--text-field", "nope"]


def demo() -> Iterator[list[str]]:
    """Arguments of `demo`."""
    yield []
    yield from ([f"{{{name}}}"] for name in BROKEN_MODELS)
    for option, values in {
        "--prompt": ("", "  ", "word " * 200, "a \udcff"),
        "--layers": ("", "x", "99", "-1", "0,x"), "--device": ("tpu",),
        "--tokenizer": ("{nowhere}",), "--output": ("x.jpg", "{dir}", "{file}/x.svg", "/proc/x.png", "x"),
    }.items():  # fmt: skip
        yield from (["{model}", option, value] for value in values)


def evaluate() -> Iterator[list[str]]:
    """Arguments of `evaluate`."""
    yield from ([], ["{model}", "{model}"])
    yield from ([f"{{{name}}}"] for name in BROKEN_MODELS)
    for option, values in {
        "--tasks": ("", ",", "nope", "perplexity,nope", "perplexity,perplexity", "Perplexity"), "--mode": ("", "end"),
        "--tokens": (*WHOLE, "0"), "--context": (*WHOLE, "0", "1", "4096"), "--stride": (*WHOLE, "0"),
        "--samples": (*WHOLE, "0"), "--limit": (*WHOLE, "0"), "--seed": WHOLE, "--shots": WHOLE,
        "--multiples": ("0", "2", "-1", "x", "nan", "1,,x", "1,99999999"), "--lengths": ("0", "-5", "x"),
        "--yarn": ("0", "1", "-2", "x", "nan", "inf"), "--depths": ("-1", "2", "x", "nan"),
        "--rope-theta": (*NUMBERS, "0", "1", "-5", "inf"), "--local-dir": ("{nowhere}", "{file}"), "--device": ("tpu",),
        "--data": ("{nowhere}", "{empty}"), "--output": ("{file}", "/proc/nope"), "--tokenizer": ("{nowhere}",),
    }.items():  # fmt: skip
        yield from (["{model}", option, value] for value in values)
    yield [
        "{model}",
        "--tasks",
        "perplexity,length",
        "--context",
        "32",
        "--multiples",
        "1,2",
        "--data",
        "{short.jsonl}",
    ]
    yield ["{model}", "--tasks", "perplexity,quantization", "--tokens", "64", "--context", "64"]
    yield ["{model}", "--tasks", "perplexity,retrieval", "--lengths", "8"]
    yield ["{model}", "--tasks", "retrieval", "--depths", ""]


def convert() -> Iterator[list[str]]:
    """Arguments of `convert`."""
    yield from ([], ["{model}"])
    broken = [name for name in BROKEN_MODELS if name not in ("no_tokenizer", "tokenizer_cut")]
    yield from ([f"{{{name}}}", "{out}"] for name in broken)
    for option, values in {
        "--to": ("", "qwen9", "Gated"), "--init": ("ones", ""), "--add-gate": ("", "nope", "baseline", "sdpa-headwise"),
        "--max-shard-size": ("", "0", "0GB", "-1GB", "x", "1.5GB", "5"),
    }.items():  # fmt: skip
        yield from (["{model}", "{out}", option, value] for value in values)
    yield from (["{model}", target] for target in ("{file}", "{model}", "{study}", "{file}/x", "/proc/nope"))


def retrieval_data() -> Iterator[list[str]]:
    """Arguments of `retrieval-data`."""
    yield from (
        [],
        ["{out}.jsonl"],
        ["{out}.jsonl", "--tokenizer", "{nowhere}"],
        ["{out}.jsonl", "--tokenizer", "bpe-300"],
    )
    for option, values in {
        "--lengths": ("", "0", "-5", "x", "8", "nan"), "--depths": ("", "-1", "2", "x", "nan"),
        "--samples": (*WHOLE, "0"), "--seed": WHOLE, "--filler": ("{nowhere}", "{empty}"),
    }.items():  # fmt: skip
        yield from (["{out}.jsonl", "--tokenizer", "bytes", option, value] for value in values)
    yield from ([path, "--tokenizer", "bytes"] for path in ("{dir}", "{file}/x", "/proc/nope", "{nowhere}/x/y.jsonl"))


def tokenize() -> Iterator[list[str]]:
    """Arguments of `tokenize`."""
    yield from ([], ["{good.jsonl}"], ["{good.jsonl}", "{nowhere}.txt", "{out}"])
    yield from ([f"{{{name}}}", "{out}"] for name in BROKEN_DATA if name != "tiny")
    yield from (["{good.jsonl}", f"{{{name}}}", "{out}"] for name in ("broken.jsonl", "broken.parquet", "bytes.txt"))
    for option, values in {
        "--tokenizer": ("", "{nowhere}", "{empty}", "bpe-0", "bpe-9999"), "--text-field": ("", "nope"),
        "--shard-tokens": (*WHOLE, "0"), "--processes": (*WHOLE, "0"),
    }.items():  # fmt: skip
        yield from (["{good.jsonl}", "{out}", option, value] for value in values)
    yield from (["{good.jsonl}", place] for place in ("{file}", "{file}/x", "{study}", "/proc/nope", "a\0b"))
    yield from (["{corpus}", "{corpus}/x"], ["{corpus}", "{corpus}"])


COMMANDS = (compare, report, variants, analyze, demo, evaluate, convert, retrieval_data, tokenize)

CASES = [[command.__name__.replace("_", "-"), *words] for command in COMMANDS for words in command()]
