"""Documents from files, folders, the hub, or the running Python's own standard library."""

import sysconfig
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

STDLIB = "stdlib"
"""The embedded default corpus: the source text of Python's standard library, there on every machine."""

_JSON = (".jsonl", ".json")
_PACKED = (".gz", ".xz", ".zst", ".bz2")
_PLAIN = (".txt", ".md", ".rst", ".py")


def load_documents(source: str, text_field: str = "text") -> Dataset:
    """One row per document: `text`, and `domain` where the source names one, otherwise empty.

    Args:
        source: `stdlib`; a file or folder of plain text, JSON lines (also .gz .xz .zst .bz2) or Parquet; or a
            hub data set, `owner/name`, `owner/name:config` or `owner/name:config@split`.
        text_field: The field that holds the text in JSON lines, Parquet and hub data sets.

    Raises:
        ValueError: if the source cannot be found or read, has no such field, or holds no text.
    """
    path = Path(source).expanduser()
    if source == STDLIB:
        documents = _read_plain(_stdlib_files(), Path(sysconfig.get_path("stdlib")))
    elif path.exists():
        documents = _load_local(path)
    else:
        documents = _load_hub(source)
    return _normalise(documents, source, text_field)


def source_files(source: str) -> list[Path]:
    """The local files that a source is read from; empty for a hub name."""
    path = Path(source).expanduser()
    if source == STDLIB:
        return _stdlib_files()
    if not path.exists():
        return []
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _format(p))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
    files = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    return sorted(files)


def _format(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _PACKED:
        suffixes = suffixes[:-1]
    last = suffixes[-1] if suffixes else ""
    if last in _JSON:
        return "json"
    if path.suffix == ".parquet":
        return "parquet"
    return "text" if path.suffix in _PLAIN else None


def _load_local(path: Path) -> Dataset:
    files = source_files(str(path))
    by_format: dict[str, list[Path]] = {}
    for file in files:
        by_format.setdefault(_format(file) or "", []).append(file)
    if path.is_file() and "" in by_format:
        known = ", ".join((*_PLAIN, *_JSON, ".parquet"))
        raise ValueError(f"{path} is of no known format; use {known}, JSON lines also packed as {', '.join(_PACKED)}")
    if not files:
        raise ValueError(f"{path} holds no text, JSON lines or Parquet files; give a file or another folder")
    if len(by_format) > 1:
        raise ValueError(f"{path} mixes {', '.join(sorted(by_format))} files; give one folder per format")
    (kind, members), *_ = by_format.items()
    if kind == "text":
        return _read_plain(members, path if path.is_dir() else path.parent)
    if any(file.suffix == ".zst" for file in members):
        _require_zstandard()
    empty = [file for file in members if file.stat().st_size == 0]
    if empty:
        raise ValueError(f"{empty[0]} is empty; give a file with text")
    try:
        return datasets.load_dataset(kind, data_files=[str(file) for file in members], split="train")
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DataFilesNotFoundError, OSError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as {kind}: {cause}") from error


def _read_plain(files: list[Path], root: Path) -> Dataset:
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            if len(files) == 1:
                raise ValueError(f"{file} is not UTF-8 text; convert it first") from None
            continue  # one odd file in a folder of text
    return Dataset.from_dict({"text": texts})


def _require_zstandard() -> None:
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise ValueError("reading .zst needs zstandard; pip install gated-attention[zstd]") from error


def _load_hub(source: str) -> Dataset:
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"no file or folder {source!r}; give a path that exists, a hub data set, or 'stdlib'")
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except (ValueError, OSError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(
            f"{source!r} is neither a file or folder nor a hub data set within reach ({cause}); check the path"
        ) from error


def _normalise(documents: Dataset, source: str, text_field: str) -> Dataset:
    field = text_field if text_field in documents.column_names else None
    if field is None and documents.num_rows:
        columns = ", ".join(documents.column_names)
        raise ValueError(f"{source} has no field {text_field!r}; it has {columns}; name the one with the text")
    columns: dict[str, Any] = {"text": documents[field][:] if field else []}
    if any(text is not None and not isinstance(text, str) for text in columns["text"][:100]):
        raise ValueError(f"field {text_field!r} of {source} does not hold text; name the field that does")
    domains = documents["domain"][:] if "domain" in documents.column_names else [""] * len(columns["text"])
    rows = [(text, domain or "") for text, domain in zip(columns["text"], domains, strict=True) if text]
    if not rows:
        raise ValueError(f"{source} holds no text; give another source")
    texts, kept = zip(*rows, strict=True)
    return Dataset.from_dict({"text": list(texts), "domain": list(kept)})
