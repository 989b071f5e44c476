"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """In a new worker: end with the main process, also if that is killed, and leave Ctrl-C to it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the main process acts


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
