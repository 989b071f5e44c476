"""One rank of `test_distributed.py`: the same batch as one process has, split over ranks; run by torchrun."""

import sys
from pathlib import Path

import torch
from moe_model import AUXILIARY, batch, moe_model, train_tiny
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gated_attention.train.auxiliary import AuxiliaryLosses

distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
folder = Path(sys.argv[1])


def gradients(how, num_passes):
    """Loss and gradients of this rank's rows, in some passes."""
    model = moe_model()
    losses = AuxiliaryLosses(model, AUXILIARY)
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        runs = fully_shard(model, mesh=mesh)
    else:
        runs = DistributedDataParallel(model)
    passes = [{"input_ids": ids, "labels": ids} for ids in batch().chunk(world)[rank].chunk(num_passes)]
    counts = losses.count(runs, passes) if num_passes > 1 else None
    total = 0.0
    for inputs in passes:
        with losses.gather():
            loss = runs(**inputs, use_cache=False).loss / num_passes
        loss = loss + losses.loss(counts, num_passes)
        loss.backward()
        total = total + loss.detach()
    distributed.all_reduce(total)
    whole = {
        name: p.grad.full_tensor() if how == "fsdp" else p.grad  # a collective: every rank must ask
        for name, p in model.named_parameters()
    }
    return {"loss": total / world, "gradients": whole, "logged": losses.read()}


found = {f"{how}-{num}": gradients(how, num) for how in ("ddp", "fsdp") for num in (1, 2)}
found["train"] = train_tiny(folder / "run", batch_size=2, accumulation=2)
if rank == 0:
    torch.save(found, folder / "found.pt")
distributed.destroy_process_group()
