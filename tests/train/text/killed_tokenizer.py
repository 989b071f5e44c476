"""Kills itself at one event after the other while it tokenises; `test_tokenize.py` runs it: SOURCE FOLDER STRIDE.

An event is a rename, just before and just after it, or a piece of text that reaches a shard.
"""

import os
import signal
import sys
from pathlib import Path
from random import Random

from gated_attention.shards.unfinished import TokenizeConfig
from gated_attention.shards.write import ShardWriter
from gated_attention.train.text import pieces
from gated_attention.train.text.tokenize import tokenize

pieces._BATCH_CHARACTERS = 100
left = [-1]  # events until the end


def count_down():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def killing(method):
    def wrapped(*args, **options):
        count_down()
        found = method(*args, **options)
        count_down()
        return found

    return wrapped


def run(folder, events=-1):
    """Tokenise in a process of its own, which dies at that event; whether it lived."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    left[0] = events
    tokenize(TokenizeConfig((sys.argv[1],), "bpe-270", shard_tokens=800), folder)
    os._exit(0)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    Path.replace, ShardWriter.add = killing(Path.replace), killing(ShardWriter.add)
    root = Path(sys.argv[2])
    assert run(root / "whole")
    whole = content(root / "whole")
    assert sum(name.endswith(".npy") for name in whole) > 3

    deaths, at = 0, 1
    while not run(root / f"killed{at}", at):
        assert run(root / f"killed{at}")
        assert content(root / f"killed{at}") == whole, at
        deaths, at = deaths + 1, at + int(sys.argv[3])
    draw, rounds = Random(0), 0
    while not run(root / "again", draw.randrange(12, 40)):
        rounds += 1
    assert content(root / "again") == whole
    sys.stdout.write(f"{deaths} {rounds}")
