"""Arms side by side: each worker process trains one arm after the other, on its own GPU."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from gated_attention.processes import follow_parent
from gated_attention.study.arms import Arm, ArmObserver, Observer
from gated_attention.study.record import Result
from gated_attention.train.callbacks import Progress

_POLL_S = 0.2
_VISIBLE = "CUDA_VISIBLE_DEVICES"

_Run = Callable[[Arm, ArmObserver], Result]

OnError = Callable[[Arm, Exception], None]
"""Takes note of what ended an arm, or raises to end the others, too."""


def raise_error(arm: Arm, error: Exception) -> None:
    """Let what ended an arm end the study."""
    raise error


def run_side_by_side(
    arms: Sequence[Arm],
    run: _Run,
    observer: Observer,
    num_workers: int,
    *,
    on_gpus: bool,
    on_error: OnError = raise_error,
) -> dict[tuple[str, str, int], Result]:
    """The results of all arms by their keys; an idle worker takes the next arm.

    On Ctrl-C, or when an arm fails and `on_error` raises, all workers end at once; run again, their arms resume from
    their last checkpoints. A script that calls this needs `if __name__ == "__main__"`.

    Args:
        run: Trains one arm; it is called in the workers, so it must be a function of a module.
        on_gpus: Whether each worker sees one GPU only; if there are fewer, workers share them.

    Raises:
        RuntimeError: if a worker is killed.
    """
    context = multiprocessing.get_context("spawn")
    events: SimpleQueue[Any] = context.SimpleQueue()
    num_threads = max(1, torch.get_num_threads() // num_workers)
    num_gpus = torch.cuda.device_count() or num_workers
    waiting, results = list(arms), dict[tuple[str, str, int], Result]()
    running: dict[Future[Result], tuple[_Worker, Arm]] = {}
    workers: list[_Worker] = []
    try:
        for index in range(num_workers):
            pool = partial(ProcessPoolExecutor, 1, context, _enter, (events, num_threads))
            workers.append(_Worker(pool, gpu=index % num_gpus if on_gpus else None))
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
                try:
                    results[arm.key] = future.result()
                except Exception as error:
                    on_error(arm, _in_words(error))
                    if waiting:
                        worker.restart()
                else:
                    observer.finish(arm, results[arm.key], kept=False)
    except BaseException:
        for worker in workers:
            worker.process.terminate()
        raise
    finally:
        for worker in workers:
            worker.pool.shutdown()
    return results


def _in_words(error: Exception) -> Exception:
    if not isinstance(error, BrokenProcessPool):
        return error
    killed = RuntimeError("a process that trained an arm was killed, perhaps for lack of memory; run the study again")
    killed.__cause__ = error
    return killed


class _Worker:
    """A pool of one process, and that process."""

    def __init__(self, make_pool: Callable[[], ProcessPoolExecutor], gpu: int | None) -> None:
        self.make_pool, self.gpu = make_pool, gpu
        self.start()

    def start(self) -> None:
        """Start the process."""
        self.pool = self.make_pool()
        others = set(multiprocessing.active_children())
        with _seeing(self.gpu):
            self.pool.submit(os.getpid)  # the first task starts the process, with the present environment
        (self.process,) = set(multiprocessing.active_children()) - others

    def restart(self) -> None:
        """Another process in the place of this one, which may be broken."""
        self.process.terminate()
        self.pool.shutdown()
        self.start()


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
    follow_parent()  # the workers of a killed study must not continue without its lock


def _run_watched(run: _Run, arm: Arm) -> Result:
    return run(arm, _Sender(_events, str(arm)))
