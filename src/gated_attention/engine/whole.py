"""Which checkpoints of a run are whole: what was written is there, file by file, and nothing is cut."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter

from gated_attention.files import write_text

DONE_NAME = ".metadata.json"
"""The last file of a checkpoint that OLMo-core writes."""

SIZES_NAME = ".sizes.json"
"""Bytes of every file of a checkpoint, by its name; written before `DONE_NAME`."""

_STEP = re.compile(r"step(\d+)")
_SIZES = TypeAdapter(dict[str, int])


def checkpoint_step(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(folder.name.removeprefix("step"))


def write_sizes(checkpoint: Path) -> None:
    """Note how large every file is."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SIZES_NAME]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_text(checkpoint / SIZES_NAME, json.dumps(sizes, indent=1) + "\n")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        if not (checkpoint / DONE_NAME).is_file():
            return "it was not finished"
        sizes = _SIZES.validate_json((checkpoint / SIZES_NAME).read_bytes(), strict=True)
        for name, size in sizes.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (found := path.stat().st_size) != size:
                return f"{name} has {found:,} bytes, not {size:,}"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    return None


def last_whole(run: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return next((one for one in _newest_first(run) if find_damage(one) is None), None)


def clear_unfinished(run: Path, say: Callable[[str], None]) -> Path | None:
    """Remove what a kill left half-written, and checkpoints that are damaged; returns the newest whole one.

    Args:
        say: Told of each damaged one that was finished.
    """
    for part in run.glob("step*-tmp"):
        shutil.rmtree(part)
    for checkpoint in _newest_first(run):
        if (reason := find_damage(checkpoint)) is not None:
            if (checkpoint / DONE_NAME).exists():
                say(f"{checkpoint} is damaged ({reason}) and removed")
            _remove(checkpoint)
    return last_whole(run)


def keep_newest(run: Path | str, count: int) -> None:
    """Remove all but the newest checkpoints; one that is not whole does not count, so that a whole one always stays."""
    whole = [one for one in _newest_first(Path(run)) if find_damage(one) is None]
    for checkpoint in whole[max(1, count) :]:
        _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    (checkpoint / DONE_NAME).unlink(missing_ok=True)  # first: what a kill leaves is then no checkpoint
    shutil.rmtree(checkpoint)


def _newest_first(run: Path) -> list[Path]:
    found = [path for path in run.glob("step*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step, reverse=True)
