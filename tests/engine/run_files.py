"""A small run for the tests of `train`, and processes that train it."""

import multiprocessing
import os
import signal
import socket
import sys
from random import Random

from gated_attention.cli import main

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["run_files", "gated_attention.study.engine_run.run", "gated_attention.engine.run.train"]
)
"""A new process has OLMo-core imported already, which takes 10 s of a core."""

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


def _train(arguments, environment, printed):
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with printed.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(["train", *arguments])


def start(file, output, processes, *changes):
    """Start `train` on so many processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "XDG_CACHE_HOME": str(file.parent / "cache"),
    }  # fmt: skip
    arguments = [str(file), "--output", str(output), *(word for change in changes for word in ("--set", change))]
    started = []
    for rank in range(processes):
        ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        printed = output.with_name(f"{output.name}-{rank}.txt")
        started.append(PROCESSES.Process(target=_train, args=(arguments, ranked, printed)))
        started[-1].printed = printed
        started[-1].start()
    return started


def finish(started, code=0):
    """Wait for processes that end with a code; returns what the first printed."""
    for process in started:
        process.join(timeout=200)
    printed = [process.printed.read_text() for process in started]
    assert [process.exitcode for process in started] == [code] * len(started), "\n".join(printed)[-6000:]
    return printed[0]


def kill(started):
    """End processes at once; returns whether all were alive."""
    alive = [process.is_alive() for process in started]
    for process in started:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return all(alive)
