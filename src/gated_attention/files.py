"""How files are written: beside their place, whole, then renamed; and how a folder is held by one process at a time."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from filelock import FileLock, Timeout

PART = ".part-"
"""How the names of unfinished files and folders begin."""

LOCK_NAME = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; otherwise the old one stays.

    Links are followed, modes are the umask's, and what is no regular file, such as a pipe, is written to directly.
    Parts that killed processes left in the same folder are removed.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        with target.open("wb") as stream:
            yield stream
        return
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    file = _open_part(target.parent)
    part = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with `replacing`; what UTF-8 cannot say, such as bytes of odd file names, is written as an escape."""
    with replacing(path) as file:
        file.write(_bytes(text))


def write_all(folder: Path, files: Mapping[str, str], stale: Iterable[str] = ()) -> list[Path]:
    """Write texts by their names below a folder that exists: all of them or, on a full disk, none.

    Args:
        folder: Where they go; folders in the names are made.
        files: In the order in which they take their places.
        stale: Names of an earlier writing that are removed where this one does not have them.
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


@contextmanager
def writing_to(place: Path | str, cure: str = "choose another --output") -> Iterator[None]:
    """Turn what the system says while `place` is written into one line.

    Raises:
        ValueError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to {place} ({error.strerror or error}); {cure}") from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, for this process alone; a kill lets go of it, too.

    Folders that were made for nothing are removed afterwards.

    Raises:
        ValueError: if another process holds it, or it cannot be made.
    """
    with ExitStack() as stack:
        with writing_to(folder):
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            stack.callback(_remove_empty, made)
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK_NAME)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise ValueError(
                    f"{folder} is in use by {_holder(folder / LOCK_NAME)}; wait for it or choose another --output"
                ) from None
            stack.callback(_let_go, lock)
            Path(lock.lock_file).write_text(_self(), encoding="utf-8")
        yield


@contextmanager
def waiting_for(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `path`, after its present holder; `say` reports a wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"waiting for {_holder(path)}")
        lock.acquire()
    try:
        path.write_text(_self(), encoding="utf-8")
        yield
    finally:
        _let_go(lock)


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files that killed processes left anywhere below a folder that is claimed."""
    for part in folder.rglob(f"{PART}*"):
        _remove_if_abandoned(part)


def is_held(path: Path) -> bool:
    """Whether some process has the lock `path`; the file is gone afterwards if none has."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    _let_go(lock)
    return False


def _let_go(lock: FileLock) -> None:
    # Removed while it is held: filelock passes over a lock whose file is gone by the time it has it.
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _self() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        if text := path.read_text(encoding="utf-8").strip():
            return text
    return "another process"


def _remove_empty(folders: Iterable[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _open_part(folder: Path) -> BinaryIO:
    for leftover in folder.glob(f"{PART}*"):
        _remove_if_abandoned(leftover)
    while True:
        file = (folder / f"{PART}{uuid4().hex[:16]}").open("xb")
        with suppress(OSError):  # a file system without locks: nobody takes the part for abandoned there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else another process took it for abandoned before it was locked
            return file
        file.close()


def _remove_if_abandoned(part: Path) -> None:
    """Remove a file that no process has locked; who writes one holds it until it has its name."""
    with suppress(OSError), part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()
