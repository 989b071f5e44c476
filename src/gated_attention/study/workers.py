"""Arms side by side: each worker process trains one arm after the other, on its own GPU."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from gated_attention.study.arms import Arm, ArmObserver, Observer
from gated_attention.study.record import Result
from gated_attention.train.callbacks import Progress

_POLL_S = 0.2
_VISIBLE = "CUDA_VISIBLE_DEVICES"

_Run = Callable[[Arm, ArmObserver], Result]


def run_side_by_side(
    arms: Sequence[Arm], run: _Run, observer: Observer, num_workers: int, *, on_gpus: bool
) -> dict[tuple[str, int], Result]:
    """The results of all arms by their keys; an idle worker takes the next arm.

    When anything fails, or on Ctrl-C, all workers end at once; run again, their arms resume from their last
    checkpoints. A script that calls this needs `if __name__ == "__main__"`.

    Args:
        run: Trains one arm; it is called in the workers, so it must be a function of a module.
        on_gpus: Whether each worker sees one GPU only.

    Raises:
        RuntimeError: if a worker is killed.
    """
    context = multiprocessing.get_context("spawn")
    events: SimpleQueue[Any] = context.SimpleQueue()
    waiting, results = list(arms), dict[tuple[str, int], Result]()
    running: dict[Future[Result], tuple[_Worker, Arm]] = {}
    workers: list[_Worker] = []
    try:
        for index in range(num_workers):
            pool = ProcessPoolExecutor(1, context, _enter, (events, max(1, torch.get_num_threads() // num_workers)))
            workers.append(_Worker(pool, gpu=index if on_gpus else None))
        idle = workers.copy()
        while waiting or running:
            while waiting and idle:
                worker, arm = idle.pop(0), waiting.pop(0)
                running[worker.pool.submit(_run_watched, run, arm)] = worker, arm
            done, _ = wait(running, _POLL_S, FIRST_COMPLETED)
            while not events.empty():
                what, arguments = events.get()
                getattr(observer, what)(*arguments)
            for future in done:
                worker, arm = running.pop(future)
                idle.append(worker)
                results[arm.key] = future.result()
                observer.finish(arm, results[arm.key], kept=False)
    except BaseException as error:
        for worker in workers:
            worker.process.terminate()
        if isinstance(error, BrokenProcessPool):
            message = "a process that trained an arm was killed, perhaps for lack of memory; run the study again"
            raise RuntimeError(message) from error
        raise
    finally:
        for worker in workers:
            worker.pool.shutdown()
    return results


class _Worker:
    """A pool of one process, and that process."""

    def __init__(self, pool: ProcessPoolExecutor, gpu: int | None) -> None:
        self.pool = pool
        others = set(multiprocessing.active_children())
        with _seeing(gpu):
            pool.submit(os.getpid)  # the first task starts the process, with the present environment
        (self.process,) = set(multiprocessing.active_children()) - others


@contextmanager
def _seeing(gpu: int | None) -> Iterator[None]:
    """Let processes that start in the block see one of the GPUs visible here, by its index; None changes nothing."""
    before = os.environ.get(_VISIBLE)
    if gpu is not None:
        os.environ[_VISIBLE] = before.split(",")[gpu] if before else str(gpu)
    try:
        yield
    finally:
        os.environ.pop(_VISIBLE, None)
        if before is not None:
            os.environ[_VISIBLE] = before


class _Sender:
    """The observer in a worker; it forwards everything to the observer in the main process."""

    def __init__(self, events: "SimpleQueue[Any]", name: str) -> None:
        self.events, self.name = events, name

    def say(self, message: str) -> None:
        self.events.put(("say", (f"{self.name}: {message}",)))

    def start(self, arm: Arm) -> None:
        self.events.put(("start", (arm,)))

    def progress(self, arm: Arm, progress: Progress) -> None:
        self.events.put(("progress", (arm, progress)))


_events: "SimpleQueue[Any]"


def _enter(events: "SimpleQueue[Any]", num_threads: int) -> None:
    global _events  # noqa: PLW0603  # a pool's initialiser has no other place for what its tasks need
    _events = events
    torch.set_num_threads(num_threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the main process acts


def _end_with_parent() -> None:
    """End this process with the main one: the workers of a killed study must not continue without its lock."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_watched(run: _Run, arm: Arm) -> Result:
    return run(arm, _Sender(_events, str(arm)))
