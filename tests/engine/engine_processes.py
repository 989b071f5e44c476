"""Processes of one run, started as torchrun would, with OLMo-core imported already: that takes 10 s of a core."""

import multiprocessing
import os
import socket
import sys

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["run_files", "worker", "save_worker", "gated_attention.study.engine_run.run", "gated_attention.engine.run.train"]
)


def _run(target, arguments, environment, printed):
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with printed.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*arguments)


def start(num, printed, target, *arguments, **environment):
    """Call a function of a module in so many processes, which print into files that begin with the path `printed`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {
        "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = []
    for rank in range(num):
        ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        path = printed.with_name(f"{printed.name}-{rank}.txt")
        started.append(PROCESSES.Process(target=_run, args=(target, arguments, ranked, path)))
        started[-1].printed = path
        started[-1].start()
    return started


def finish(started, code=0, timeout=400):
    """Wait for processes that end with a code; returns what the first printed."""
    for process in started:
        process.join(timeout=timeout)
    printed = [process.printed.read_text() for process in started]
    assert [process.exitcode for process in started] == [code] * len(started), "\n".join(printed)[-6000:]
    return printed[0]
