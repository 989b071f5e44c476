"""What the processes of `test_workers.py` do in the place of training; they import this by name."""

import os
import signal


def tell_gpu(arm, observer):
    observer.start(arm)
    observer.say("looking")
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()


def fail_at_the_second(arm, observer):
    if arm.variant.name != "baseline":
        raise ValueError(f"{arm.variant.name} cannot train")
    signal.pause()  # until somebody ends this process


def die(arm, observer):
    os.kill(os.getpid(), signal.SIGKILL)
