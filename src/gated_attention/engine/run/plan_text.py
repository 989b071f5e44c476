"""A plan in words."""

from gated_attention.engine.run.plan import Plan
from gated_attention.engine.run.run_file import Run


def plan_lines(run: Run, plan: Plan) -> list[str]:
    """What `train --plan` prints."""
    file, memory = run.file, plan.memory
    parallel, batch, cost = file.parallel, file.batch, file.cost
    name = f"{file.model.size or 'custom'} {run.variant}"
    active = f", {_count(plan.active)} of them active" if plan.active < plan.parameters else ""
    rows = {
        "model": f"{name}: {_count(plan.parameters)} parameters{active}; {run.block.describe()}",
        "layout": _layout(run),
        "memory per GPU": f"{_gb(memory.total)} of {_gb(plan.gpu.memory)} ({cost.gpu})",
        "  weights": _gb(memory.weights),
        "  gradients": _gb(memory.gradients),
        "  optimizer": _gb(memory.optimizer),
        "  gathered": _gb(memory.gathered),
        "  activations": f"{_gb(memory.activations)}, an estimate; recompute = {file.precision.recompute!r}",
        "  logits": f"{_gb(memory.logits)}, an estimate",
        "step": (
            f"{plan.tokens_per_step:,} tokens: {batch.sequences:,} sequences of {run.context:,}, "
            f"{run.micro} per GPU and pass"
        ),
        "run": f"{run.steps:,} steps, {_count(plan.tokens)} tokens",
        "FLOPs per token": (
            f"{_count(plan.flops.total)}: weights {_count(plan.flops.weights)}, "
            f"causal attention {_count(plan.flops.attention)}, gates {_count(plan.flops.gates)}"
        ),
        "FLOPs": f"{plan.total_flops:.3g}",
        "time": (
            f"{plan.gpu_hours:,.4g} GPU hours at an MFU of {cost.mfu:g}: {_time(plan.days)} on {parallel.gpus:,} "
            f"GPU{'s' * (parallel.gpus > 1)}"
        ),
        "cost": f"${plan.dollars:,.2f} at ${cost.dollars_per_gpu_hour:g} per GPU hour",
    }
    lines = [f"{key:<16} {value}" for key, value in rows.items()]
    if not plan.fits:
        cures = ["a smaller batch.micro"] * (run.micro > 1)
        cures += ["precision.recompute 'full'"] * (file.precision.recompute == "none")
        cures += ["fewer parallel.replicas"] * (parallel.replicas > 1)
        lines.append(f"this does not fit: choose {', '.join([*cures, 'more GPUs'])}")
    return lines


def _layout(run: Run) -> str:
    parallel = run.file.parallel
    shards = parallel.gpus // parallel.replicas
    if parallel.gpus == 1:
        return "one GPU"
    words = [f"{parallel.gpus:,} GPUs"]
    words.append(f"HSDP, {parallel.replicas} replicas of {shards} shards" if parallel.replicas > 1 else "FSDP")
    words += [f"{kind} {degree}" for kind in ("tensor", "context") if (degree := getattr(parallel, kind)) > 1]
    return ", ".join(words)


def _count(number: float) -> str:
    return f"{number / 1e9:,.3f} B" if number >= 1e8 else f"{number / 1e6:,.3f} M"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def _time(days: float) -> str:
    return f"{days:,.1f} days" if days >= 2 else f"{days * 24:,.1f} hours" if days >= 0.1 else f"{days * 1440:,.1f} min"
