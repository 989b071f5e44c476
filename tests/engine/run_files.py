"""A small run for the tests of `train`, and processes that train it."""

import os
import signal
from random import Random

import engine_processes

from gated_attention.cli import main

SETTINGS = """
name = "small"
[model]
variant = "sdpa-headwise"
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 16
intermediate_size = 64
ffn_multiple = 2
vocab_size = 258
[data]
text = "text.txt"
tokenizer = "bytes"
context = 32
[optimizer]
learning_rate = 0.01
[schedule]
steps = 20
warmup = 0.1
[batch]
sequences = 8
[precision]
compute = "float32"
[checkpoints]
every = 4
[evaluation]
every = 10
tokens = 500
log_every = 1
"""


def write_run(folder):
    """The file of the run and its text; returns the file."""
    random, words = Random(0), ["alpha", "beta", "gamma", "delta"]
    lines = [" ".join(random.choice(words) for _ in range(10)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "small.toml").write_text(SETTINGS.replace("text.txt", str(folder / "text.txt")))
    return folder / "small.toml"


def _train(arguments):
    main(["train", *arguments])


def start(file, output, processes, *changes):
    """Start `train` on so many processes, as torchrun would."""
    arguments = [str(file), "--output", str(output), *(word for change in changes for word in ("--set", change))]
    return engine_processes.start(processes, output, _train, arguments, XDG_CACHE_HOME=str(file.parent / "cache"))


def kill(started):
    """End processes at once; returns whether all were alive."""
    alive = [process.is_alive() for process in started]
    for process in started:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return all(alive)
