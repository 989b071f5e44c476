"""Files are written whole or not at all; a folder is held by one process at a time."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn
from uuid import uuid4

PART = ".part-"
"""Prefix of the names of unfinished files and folders."""

LOCK_NAME = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` when the block ends without an error; otherwise the old one stays.

    Links are followed, modes follow the umask, and what is no regular file, such as a pipe, is written directly.
    Parts that killed processes left in the same folder are removed.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            yield stream
        return
    part, handle = _new_part(target.parent, is_folder=False)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that takes the place of `path`, absent or empty, when the block ends without an error.

    Otherwise it is removed. So are parts that killed processes left beside it.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    part, handle = _new_part(target.parent, is_folder=True)
    try:
        yield part
        part.replace(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with `replacing`; what UTF-8 cannot encode, such as surrogates in file names, becomes an escape."""
    with replacing(path) as file:
        file.write(_bytes(text))


def write_all(folder: Path, files: Mapping[str, str], stale: Iterable[str] = ()) -> list[Path]:
    """Write texts below a folder that exists: all of them or, on a full disk, none.

    Args:
        folder: Where they go; folders in the names are created.
        files: Texts by name, in the order in which they replace the old ones.
        stale: Names from earlier calls; those that are not in `files` are removed.
    """
    with ExitStack() as stack:
        for name, text in reversed(list(files.items())):  # a stack unwinds from its end
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(replacing(folder / name))
            file.write(_bytes(text))
            file.flush()
    for name in set(stale) - set(files):
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]


def cache_folder() -> Path:
    """Where packed text is kept between runs: below XDG's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gated_attention"


@contextmanager
def writing_to(place: Path | str, cure: str = "choose another --output") -> Iterator[None]:
    """Turn an OSError of the block into a ValueError of one line."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to {place} ({error.strerror or error}); {cure}") from error


@contextmanager
def claimed(folder: Path, other: str = "--output") -> Iterator[None]:
    """Hold a folder for this process alone, creating it if needed; a kill releases it, too.

    Created folders that stay empty are removed afterwards.

    Args:
        other: What the caller can choose another of.

    Raises:
        ValueError: if another process holds it, or it cannot be created.
    """

    def refuse(holder: str) -> NoReturn:
        raise ValueError(f"{folder} is in use by {holder}; wait for it or choose another {other}")

    with ExitStack() as stack:
        with writing_to(folder, f"choose another {other}"):
            created = [path for path in (folder, *folder.parents) if not path.exists()]
            stack.callback(_remove_empty, created)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_holding(folder / LOCK_NAME, refuse))
        yield


@contextmanager
def waiting_for(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `path`, after its present holder; `say` reports the wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _holding(path, lambda holder: say(f"waiting for {holder}")):
        yield


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files that killed processes left anywhere below a folder that is claimed."""
    for part in folder.rglob(f"{PART}*"):
        _remove_if_abandoned(part)


@contextmanager
def _holding(path: Path, on_wait: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock `path`; `on_wait` learns who holds it now, and may raise to give up."""
    from filelock import FileLock, Timeout  # not at the top, where `--help` would wait for it

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = ""
        with suppress(OSError, UnicodeDecodeError):
            holder = path.read_text(encoding="utf-8").strip()
        on_wait(holder or "another process")
        lock.acquire()
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: filelock skips a lock whose file is gone once it acquires it
        lock.release()


def _remove_empty(folders: Iterable[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _new_part(folder: Path, *, is_folder: bool) -> tuple[Path, int]:
    """A new unfinished file or folder and its open handle, which holds the lock that keeps others from removing it."""
    for leftover in folder.glob(f"{PART}*"):
        _remove_if_abandoned(leftover)
    while True:
        part = folder / f"{PART}{uuid4().hex[:16]}"
        if is_folder:
            part.mkdir()
        else:
            part.touch(exist_ok=False)
        try:
            handle = os.open(part, os.O_RDONLY if is_folder else os.O_WRONLY)
        except FileNotFoundError:  # another process removed it before it was locked
            continue
        with suppress(OSError):  # on a file system without locks, nobody takes the part for abandoned
            fcntl.flock(handle, fcntl.LOCK_EX)
        if part.exists():
            return part, handle
        os.close(handle)


def _remove_if_abandoned(part: Path) -> None:
    """Remove a file or folder that no process has locked; its writer holds the lock until it is renamed."""
    with suppress(OSError):
        handle = os.open(part, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        finally:
            os.close(handle)
