"""Read by every Python that a question starts: vLLM imports torchvision even where it serves text only.

The index's torchvision is built for CUDA. Beside a PyTorch without CUDA its operators do not load, and its import ends
where it describes the first of them.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:  # an environment without it
    pass
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
