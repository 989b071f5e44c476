"""Files of text: which of a folder are read, of which format each is, and how packed ones are opened."""

import bz2
import gzip
import io
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

_JSON = (".jsonl", ".json")
_PLAIN = (".txt", ".md", ".rst", ".py")
_PARQUET = ".parquet"
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_PACKED = (*_OPEN, ".zst")
_CHUNK_BYTES = 1 << 17

KNOWN = f"{', '.join((*_PLAIN, *_JSON, _PARQUET))}, JSON also packed as {', '.join(_PACKED)}"
"""The formats that are read, in words."""

PACKED_ERRORS: tuple[type[BaseException], ...] = (zstandard.ZstdError,) if zstandard else ()
"""What optional unpackers raise of their own."""


def text_format(path: Path) -> str | None:
    """`json`, `parquet`, `text`, or None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _PACKED
    last = suffixes[-2 if packed else -1] if len(suffixes) > packed else ""
    if last in _JSON:
        return "json"
    if packed:
        return None
    return "parquet" if last == _PARQUET else "text" if last in _PLAIN else None


def files_below(root: Path, skipped: set[str], *, follow_links: bool = True) -> list[Path]:
    """All files below a folder but hidden ones, sorted; folders of the names in `skipped` are not entered.

    Links to folders are followed. A folder or a file that several paths lead to is there once.

    Raises:
        ValueError: if a folder cannot be read, or a file that would be read is a link to nothing or no regular file.
    """
    found: dict[str, Path] = {}
    entered: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=follow_links):
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
                raise ValueError(f"{path} is {what}; mend it or leave it out")
    return sorted(found.values())


def other_formats(root: Path, skipped: set[str]) -> dict[str, int]:
    """How many files of no known format lie below a folder, by their suffixes, most first."""
    others = (file for file in files_below(root, skipped) if not text_format(file))
    return dict(Counter(file.suffix.lower() or "without a suffix" for file in others).most_common())


def open_text(file: Path) -> TextIO:
    """A file of text, unpacked as its name says.

    Raises:
        ValueError: if its unpacker is not installed.
        EOFError: here or while it is read, if a packed file ends before its text does.
    """
    suffix = file.suffix.lower()
    if suffix in _PACKED and not file.stat().st_size:
        raise EOFError("an empty file, which no packer writes")
    if suffix == ".zst":
        if zstandard is None:
            raise ValueError(f"reading {file} needs zstandard; pip install gated-attention[zstd]")
        return io.TextIOWrapper(io.BufferedReader(_Zstandard(file), _CHUNK_BYTES), encoding="utf-8-sig")
    return cast(TextIO, _OPEN.get(suffix, open)(file, "rt", encoding="utf-8-sig"))


class _Zstandard(io.RawIOBase):
    """All frames of a `.zst` file; zstandard's own reader takes a cut frame for a whole one."""

    def __init__(self, path: Path) -> None:
        self._chunks = _unpacked(path)
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = chunk
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._chunks.close()  # type: ignore[attr-defined]  # of a generator, which closes the file
        super().close()


def _unpacked(path: Path) -> Iterator[bytes]:
    frame: Any = None
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("packed text ended before the end of its frame")


def _refuse_folder(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read ({error.strerror}); mend it or leave it out")
