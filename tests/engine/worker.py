"""Trains every gate in every layout that this number of processes allows, in each of them; rank 0 saves the losses."""

from dataclasses import dataclass, field

import torch
from engine_models import MIXTURE, PARALLEL, TRAINED, config_of
from olmo_core.config import DType
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.distributed import parallel
from olmo_core.optim import AdamWConfig, CosWithWarmup
from olmo_core.train import Duration, TrainerConfig, prepare_training_environment, teardown_training_environment
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.train_module import (
    TransformerContextParallelConfig,
    TransformerDataParallelConfig,
    TransformerTensorParallelConfig,
)
from torch import distributed

from gated_attention.engine import BalancedTrainModule, GuardedCheckpointerConfig, engine_config, load_weights
from gated_attention.registry.penalty import AuxiliaryWeights

ROWS, STEPS = 8, 20
LAYOUTS = {
    "fsdp": {},
    "tp": {"tp_config": TransformerTensorParallelConfig(degree=2)},
    "cp": {"cp_config": TransformerContextParallelConfig.ulysses(degree=2)},
}


@dataclass
class Losses(Callback):
    """The cross-entropy of every step."""

    found: dict = field(default_factory=dict)

    def log_metrics(self, step, metrics):
        if "train/CE loss" in metrics:
            self.found[step] = float(metrics["train/CE loss"])


def train(folder, variant, layout, run, stop=None):
    """The losses of a run from the weights that the test saved; it goes on where `run` holds a checkpoint."""
    rows = ROWS * (1 if layout == "fsdp" else 2) // distributed.get_world_size()
    parallel._WORLD_MESH = None  # OLMo-core expects one run per process
    config = engine_config(config_of(variant, PARALLEL), AuxiliaryWeights(load_balance=0.5, router_z=0.1))
    module = BalancedTrainModule(
        config.build(init_device="meta"),
        rank_microbatch_size=min(4, rows) * PARALLEL.context,
        max_sequence_length=PARALLEL.context,
        optim=AdamWConfig(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=False),
        dp_config=TransformerDataParallelConfig(
            name=parallel.DataParallelType.fsdp, param_dtype=DType.float32, reduce_dtype=DType.float32
        ),
        max_grad_norm=1.0,
        scheduler=CosWithWarmup(warmup=4),
        device=torch.device("cpu"),
        **LAYOUTS[layout],
    )
    load_weights(module.model, folder / variant)
    data = NumpyFSLDatasetConfig(
        paths=[str(folder / "tokens.npy")],
        sequence_length=PARALLEL.context,
        tokenizer=TokenizerConfig(vocab_size=PARALLEL.vocab_size, eos_token_id=0, pad_token_id=1),
        work_dir=str(folder / "work"),
    ).build()
    loader = NumpyDataLoaderConfig(
        global_batch_size=ROWS * PARALLEL.context, seed=0, work_dir=str(folder / "work"), target_device_type="cpu"
    ).build(data, dp_process_group=module.dp_process_group)
    losses = Losses()
    TrainerConfig(
        save_folder=str(run),
        max_duration=Duration.steps(STEPS),
        hard_stop=Duration.steps(stop) if stop else None,
        device="cpu",
        metrics_collect_interval=1,
        checkpointer=GuardedCheckpointerConfig(),
        no_checkpoints=run.name == "unsaved",
        callbacks={
            "losses": losses,
            "checkpointer": CheckpointerCallback(save_interval=5, save_async=False, pre_train_checkpoint=False),
        },
    ).build(module, loader).fit()
    return losses.found


def main(folder):
    prepare_training_environment(backend="gloo", shared_filesystem=True)
    world = distributed.get_world_size()
    layouts = {1: ["fsdp"], 2: ["fsdp", "cp"], 4: ["fsdp", "tp"]}[world]
    found = {}
    for variant in TRAINED:
        for layout in layouts if variant != MIXTURE else [one for one in layouts if one != "tp"]:
            found[variant, layout] = train(folder, variant, layout, folder / "unsaved")
        run = folder / f"{variant}-stopped"
        if world == 2:
            found[variant, "stopped"] = train(folder, variant, "fsdp", run, stop=5)
        else:
            found[variant, "resumed"] = train(folder, variant, "fsdp", folder / f"{variant}-on-{world}", stop=8)
    if distributed.get_rank() == 0:
        torch.save(found, folder / f"found-{world}.pt")
    teardown_training_environment()
