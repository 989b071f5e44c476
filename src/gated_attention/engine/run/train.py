"""A run on OLMo-core: its model, optimizer, data and trainer, from the run's file."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from olmo_core.config import DType
from olmo_core.data import NumpyDataLoaderConfig, NumpyDatasetDType, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import barrier, get_rank, init_distributed, is_distributed
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode
from olmo_core.optim import AdamWConfig, CosWithWarmup, OptimGroupOverride
from olmo_core.train import Duration, TrainerConfig, teardown_training_environment
from olmo_core.train.callbacks import CheckpointerCallback, StabilityMonitorCallback
from olmo_core.train.train_module import (
    TransformerActivationCheckpointingConfig,
    TransformerContextParallelConfig,
    TransformerDataParallelConfig,
    TransformerTensorParallelConfig,
)
from olmo_core.utils import seed_all

from gated_attention.engine.checkpoints import GuardedCheckpointerConfig
from gated_attention.engine.config import engine_config, undecayed
from gated_attention.engine.convert import load_weights
from gated_attention.engine.run.callbacks import HeldOutLoss, Metrics, Prune, SkipNonFinite
from gated_attention.engine.run.run_file import Run
from gated_attention.engine.run.token_folders import Tokens
from gated_attention.engine.train_module import BalancedTrainModule
from gated_attention.engine.whole import last_whole
from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config, GatedQwen3MoeConfig, make_config

LOG_NAME = "engine.log"
"""What OLMo-core says, in the run's folder."""


class Ended(NamedTuple):
    """How training ended.

    Attributes:
        stopped_by: The signal that stopped it, `SIGTERM` or `SIGINT`; None if it came to its last step.
        tokens: Read in all, over all resumptions.
    """

    step: int
    tokens: int
    skipped: int
    stopped_by: str | None


@dataclass(frozen=True)
class Reports:
    """Who is told of a run, on the first process.

    Attributes:
        line: A line of `metrics.jsonl`.
        held_out: A step and its held-out loss.
        probe: A step and what `Probe` found, by measure and layer.
    """

    line: Callable[[dict[str, Any]], None]
    held_out: Callable[[int, float], None]
    probe: Callable[[int, dict[str, list[float]]], None]


@contextmanager
def processes(seed: int) -> Iterator[int]:
    """The process group of torchrun, if it started this process; yields the rank."""
    on_gpu = torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ:
        with redirect_stdout(StringIO()):  # it prints the variables that it sets
            init_distributed(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", shared_filesytem=True)
    seed_all(seed)
    try:
        barrier()  # the first process has cleared what was unfinished
        yield get_rank()
    finally:
        teardown_training_environment()


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """OLMo-core's log goes to a file, that of the first process; the terminal gets none of it."""
    log, is_first = logging.getLogger("olmo_core"), os.environ.get("RANK", "0") == "0"
    handler = logging.FileHandler(path, encoding="utf-8") if is_first else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.level, log.propagate = before


def model_config(run: Run, tokens: Tokens) -> GatedQwen3Config | GatedQwen3MoeConfig:
    """The model as transformers has it."""
    return make_config(
        run.size, run.block, max_position_embeddings=run.context, eos_token_id=tokens.eos_token_id, bos_token_id=None
    )


def check_trainable(run: Run, tokens: Tokens) -> None:
    """Refuse a run that would train nothing, or that the engine cannot train.

    Raises:
        ValueError: if the engine has no such model, or the data has fewer sequences than a step takes.
    """
    engine_config(model_config(run, tokens))
    found, wanted = tokens.sequences(tokens.train, run.context), run.file.batch.sequences or 0
    if found < wanted:
        raise ValueError(
            f"{tokens.source} has {found:,} sequences of {run.context:,} tokens, fewer than the {wanted:,} of a step; "
            "give more text, or a smaller batch.sequences"
        )


def train(run: Run, tokens: Tokens, folder: Path, reports: Reports) -> Ended:
    """Train from the newest whole checkpoint in `folder` to the last step, or to a SIGTERM or SIGINT.

    Every process of the run calls this.

    Raises:
        ValueError: if a checkpoint is foreign, or too many gradients in a row are not finite.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|olmo_core)\.")  # about their own calls
        return _train(run, tokens, folder, reports)


def _train(run: Run, tokens: Tokens, folder: Path, reports: Reports) -> Ended:
    file = run.file
    config = model_config(run, tokens)
    module = _module(run, config)
    if file.model.start and last_whole(folder) is None:
        load_weights(module.model, Path(file.model.start))
    skip = SkipNonFinite(limit=file.optimizer.skip_steps)
    micro = run.micro
    trainer = TrainerConfig(
        save_folder=str(folder),
        max_duration=Duration.steps(run.steps),
        device=module.device.type,
        metrics_collect_interval=file.evaluation.log_every or 1,
        cancel_check_interval=1,  # torchrun kills half a minute after it has asked
        async_bookkeeping=False,  # a line is written before the checkpoint of its step
        checkpointer=GuardedCheckpointerConfig(),
        callbacks={
            "skip": skip,
            "spikes": StabilityMonitorCallback(),
            "metrics": Metrics(every=file.evaluation.log_every or 1, report=reports.line),
            "held_out": HeldOutLoss(
                rows=tokens.held_out(run.context, file.evaluation.tokens or 1),
                every=file.evaluation.every or 1,
                probe_every=file.evaluation.probe_every or 0,
                micro=micro,
                eos=tokens.eos_token_id if file.data.packing == "documents" else None,
                report=reports.held_out,
                report_probe=reports.probe,
            ),
            "checkpointer": CheckpointerCallback(
                save_interval=file.checkpoints.every, save_async=False, pre_train_checkpoint=False, max_checkpoints=None
            ),
            "prune": Prune(keep=file.checkpoints.keep),
        },
    ).build(module, _loader(run, tokens, folder, module))
    trainer.fit()
    reason = None if trainer.global_step >= run.steps else str(trainer._cancel_reason).split()[0]
    return Ended(trainer.global_step, trainer.global_train_tokens_seen, len(skip.skipped), reason)


def _module(run: Run, config: GatedQwen3Config | GatedQwen3MoeConfig) -> BalancedTrainModule:
    file, parallel, precision = run.file, run.file.parallel, run.file.precision
    on_gpu, is_parallel = torch.cuda.is_available(), is_distributed()
    dtype = DType(precision.compute)
    options: dict[str, Any] = {}
    if is_parallel:
        is_hsdp = parallel.replicas > 1
        options["dp_config"] = TransformerDataParallelConfig(
            name=DataParallelType.hsdp if is_hsdp else DataParallelType.fsdp,
            num_replicas=parallel.replicas if is_hsdp else None,
            param_dtype=dtype,
            reduce_dtype=DType.float32,
        )
    elif precision.compute == "bfloat16":
        options["autocast_precision"] = torch.bfloat16
    if parallel.tensor > 1:
        options["tp_config"] = TransformerTensorParallelConfig(degree=parallel.tensor)
    if parallel.context > 1:
        options["cp_config"] = TransformerContextParallelConfig.ulysses(degree=parallel.context)
    if precision.recompute == "full":
        options["ac_config"] = TransformerActivationCheckpointingConfig(
            mode=TransformerActivationCheckpointingMode.selected_modules,  # `full` refuses experts
            modules=[f"blocks.{layer}" for layer in range(run.size.num_hidden_layers)],
        )
    wanted = engine_config(config, run.auxiliary)
    wanted.init_seed = file.seed
    return BalancedTrainModule(
        wanted.build(init_device="meta"),
        rank_microbatch_size=run.micro * run.context,
        max_sequence_length=run.context,
        optim=AdamWConfig(
            lr=run.learning_rate,
            betas=(file.optimizer.beta1, file.optimizer.beta2),
            eps=file.optimizer.eps,
            weight_decay=file.optimizer.weight_decay,
            fused=on_gpu,
            group_overrides=[OptimGroupOverride(params=undecayed(config), opts={"weight_decay": 0.0})],
        ),
        max_grad_norm=file.optimizer.max_grad_norm or None,
        scheduler=CosWithWarmup(warmup=run.warmup_steps, alpha_f=file.schedule.min_learning_rate),
        compile_model=bool(precision.compile),
        device=_device(),
        **options,
    )


def _loader(run: Run, tokens: Tokens, folder: Path, module: BalancedTrainModule) -> Any:
    work = str(folder / "work")
    data = NumpyFSLDatasetConfig(
        paths=[str(path) for path in tokens.train],
        sequence_length=run.context,
        dtype=NumpyDatasetDType.uint16 if tokens.dtype == "<u2" else NumpyDatasetDType.uint32,
        tokenizer=TokenizerConfig(
            vocab_size=tokens.vocab_size, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.eos_token_id
        ),
        generate_doc_lengths=run.file.data.packing == "documents",
        include_instance_metadata=False,
        work_dir=work,
    ).build()
    return NumpyDataLoaderConfig(
        global_batch_size=run.tokens_per_step, seed=run.file.seed, work_dir=work, target_device_type=_device().type
    ).build(data, dp_process_group=module.dp_process_group)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
