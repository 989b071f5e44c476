"""The device that models run on: by name, in words, and how many there are."""

import torch

from gated_attention.ranges import require_choice


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is one.

    Raises:
        ValueError: if the name is unknown or the device is missing.
    """
    require_choice("device", name, ("auto", "cpu", "cuda"))
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("device 'cuda' was asked for, and PyTorch sees none; use --device cpu")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    """The device in words, e.g. `NVIDIA H200` or `CPU, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{device.type.upper()}, {count} thread{'s' * (count > 1)}"


def count_like(device: torch.device) -> int:
    """How many devices of that type this process may use: all GPUs, the one that torchrun assigned, or the one CPU."""
    is_one_of_several = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    return torch.cuda.device_count() if device.type == "cuda" and not is_one_of_several else 1
