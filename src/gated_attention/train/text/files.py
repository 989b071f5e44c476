"""Files of text: which files of a folder are read, their formats, and how compressed ones are opened."""

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import pyarrow as pa  # type: ignore[import-untyped]

_FORMATS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".json"), "json"),
    ".parquet": "parquet",
}
_OPEN: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": partial(pa.input_stream, compression="zstd"),
}  # fmt: skip

KNOWN = f"{', '.join(_FORMATS)}, JSON also compressed as {', '.join(_OPEN)}"
"""The formats that are read, in words."""


def text_format(path: Path) -> str | None:
    """`text`, `json`, `parquet`, or None for any other."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in _OPEN:
        return "json" if _FORMATS.get(before) == "json" else None
    return _FORMATS.get(last)


def files_below(root: Path, skipped: set[str], *, follow_links: bool = True) -> list[Path]:
    """All files below a folder except hidden ones, sorted; folders named in `skipped` are not entered.

    Links to folders are followed. A folder or a file that several paths lead to is listed once.

    Raises:
        ValueError: if a folder cannot be read, or a file of a known format is a broken link or not a regular file.
    """

    def refuse(error: OSError) -> NoReturn:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}); repair it or leave it out")

    found: dict[str, Path] = {}
    entered: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=follow_links):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in entered:
            folders[:] = []
            continue
        entered.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file():
                found.setdefault(os.path.realpath(path), path)
            elif text_format(path):
                what = "a link to nothing" if path.is_symlink() and not path.exists() else "no regular file"
                raise ValueError(f"{path} is {what}; repair it or leave it out")
    return sorted(found.values())


def open_text(file: Path) -> TextIO:
    """A file of text, decompressed as its name says.

    Raises:
        EOFError: if a compressed file is empty; here or in reading, an error of its library if it is cut short.
    """
    open_binary = _OPEN.get(file.suffix.lower())
    if open_binary and not file.stat().st_size:
        raise EOFError("an empty file, which no compressor writes")
    return io.TextIOWrapper(open_binary(file) if open_binary else file.open("rb"), encoding="utf-8-sig")
