"""What watches a run between OLMo-core's steps: non-finite gradients, held-out loss, metrics, old checkpoints."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from olmo_core.data.utils import get_document_lengths
from olmo_core.distributed.utils import get_local_tensor, get_rank, get_world_size, is_distributed
from olmo_core.train.callbacks import Callback
from olmo_core.train.common import OPTIM_GRAD_NORM_METRIC, TRAIN_CE_LOSS_METRIC
from torch import Tensor, distributed

from gated_attention.engine.experts import LOAD_BALANCE, ROUTER_Z, expert_load, routers
from gated_attention.engine.run.probe import Probe
from gated_attention.engine.whole import keep_newest

_IGNORED = -100


@dataclass
class SkipNonFinite(Callback):  # type: ignore[misc]  # OLMo-core is untyped here
    """Leaves out optimizer steps whose gradient is not finite; OLMo-core itself stops at a loss that is not.

    A left out step changes neither weights nor moments. It has no loss in the metrics, and `skipped_steps` instead.

    Attributes:
        limit: How many in a row are left out; one more ends the run.
    """

    limit: int = 0
    in_a_row: int = 0
    skipped: list[int] = field(default_factory=list)

    def pre_optim_step(self) -> None:
        """Drop the gradients of this step if one is not finite on any process."""
        parameters = [one for one in self.trainer.train_module.model.parameters() if one.grad is not None]
        norms = torch._foreach_norm([get_local_tensor(one.grad) for one in parameters])
        is_finite = torch.stack(norms).isfinite().all().float()
        if is_distributed():
            distributed.all_reduce(is_finite, op=distributed.ReduceOp.MIN)
        if is_finite.item():
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            raise ValueError(
                f"the gradient of step {self.step} is not finite, the {self.in_a_row}. in a row; lower the learning "
                "rate, and go on from an earlier checkpoint"
            )
        self.skipped.append(self.step)
        for one in parameters:
            one.grad = None
        self.trainer._metrics[self.step].pop(TRAIN_CE_LOSS_METRIC, None)  # not finite, at which OLMo-core stops

    def state_dict(self) -> dict[str, Any]:
        """How many were left out up to here."""
        return {"in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.in_a_row, self.skipped = state_dict["in_a_row"], state_dict["skipped"]


@dataclass
class HeldOutLoss(Callback):  # type: ignore[misc]
    """The mean loss per held-out token, and what `Probe` measures on them, before the checkpoint of its step.

    Attributes:
        rows: Held-out sequences, (sequences, tokens); every data-parallel process reads its own.
        probe_every: Steps between measurements; 0 is none.
        eos: The token that ends a document, where documents are kept apart.
    """

    priority: ClassVar[int] = 3

    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))
    every: int = 1
    probe_every: int = 0
    micro: int = 1
    eos: int | None = None
    report: Callable[[int, float], None] = lambda step, loss: None
    report_probe: Callable[[int, dict[str, list[float]]], None] = lambda step, found: None

    def post_train_batch(self) -> None:
        """Score where it is due, and after the last step."""
        is_last = self.step == self.trainer.max_steps
        scores = self.step % self.every == 0 or is_last
        measures = self.probe_every > 0 and (self.step % self.probe_every == 0 or is_last)
        if not len(self.rows) or not (scores or measures):
            return
        probe = Probe(self.trainer.train_module.model) if measures else None
        with probe.watching() if probe else nullcontext():
            loss = self.score(probe)
        found = probe.read() if probe else None
        if get_rank() == 0:
            if scores:
                self.report(self.step, loss)
            if found is not None:
                self.report_probe(self.step, found)

    def score(self, probe: Probe | None = None) -> float:
        """The mean over all targets, the same on every process.

        Args:
            probe: Told how many sequences of each pass count; the rest only make the number of passes the same.
        """
        module, group = self.trainer.train_module, self.trainer.dp_process_group
        reader, readers = get_rank(group), get_world_size(group)
        total = torch.zeros((), dtype=torch.float64, device=self.trainer.device)
        for start in range(0, len(self.rows), self.micro * readers):
            chosen = start + reader * self.micro + np.arange(self.micro)
            ids = torch.from_numpy(self.rows[np.minimum(chosen, len(self.rows) - 1)])
            labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=_IGNORED)
            labels[torch.from_numpy(chosen >= len(self.rows))] = _IGNORED  # all processes make the same passes
            if probe is not None:
                probe.rows = int((chosen < len(self.rows)).sum())
            batch = {"input_ids": ids.to(self.trainer.device), **self._documents(ids)}
            output = module.eval_batch(batch, labels=labels.to(self.trainer.device))
            total += get_local_tensor(output.ce_loss).double().sum()
        if is_distributed():
            distributed.all_reduce(total)
        targets = len(self.rows) * (self.rows.shape[1] - 1)
        return float(total.item() / targets)

    def _documents(self, ids: Tensor) -> dict[str, Any]:
        if self.eos is None:
            return {}
        lengths = [get_document_lengths(row, self.eos) for row in ids]
        padded = torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)
        return {
            "doc_lens": padded.to(self.trainer.device),
            "max_doc_lens": [int(lengths_of_row.max()) for lengths_of_row in lengths],
        }


@dataclass
class Metrics(Callback):  # type: ignore[misc]
    """Reports every logged step: loss, rate, gradient norm, tokens, and speed without evaluation and checkpoints.

    Attributes:
        report: Called on the first process, with a line of `metrics.jsonl`.
    """

    priority: ClassVar[int] = 4

    every: int = 1
    report: Callable[[dict[str, Any]], None] = lambda line: None
    _is_first: bool = True
    _start: tuple[float, int] = (0.0, 0)
    _took: tuple[float, int] = (0.0, 0)
    _logged: dict[int, tuple[int, float | None, dict[str, Any]]] = field(default_factory=dict)

    def pre_load_batch(self) -> None:
        """A step begins."""
        self._start = time.perf_counter(), self.trainer.global_train_tokens_seen

    def post_train_batch(self) -> None:
        """A step has ended; the first of a process compiles and allocates, and does not count."""
        seen, (start, tokens) = self.trainer.global_train_tokens_seen, self._start
        if not self._is_first:
            self._took = self._took[0] + time.perf_counter() - start, self._took[1] + seen - tokens
        self._is_first = False
        if self.step % self.every == 0 or self.step == self.trainer.max_steps:
            took, tokens = self._took
            load = expert_load(self.trainer.train_module.model)
            self._logged[self.step] = seen, tokens / took if tokens else None, load
            self._took = 0.0, 0

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Report a step once OLMo-core has gathered its metrics."""
        if step not in self._logged or get_rank() != 0:
            return
        tokens, speed, load = self._logged.pop(step)
        line = {
            "step": step,
            "loss_nats": metrics.get(TRAIN_CE_LOSS_METRIC),
            "learning_rate": metrics.get("optim/LR (group 0)"),
            "grad_norm": metrics.get(OPTIM_GRAD_NORM_METRIC),
            "tokens": tokens,
            "tokens_per_s": speed,
        }
        spikes = metrics.get("spike/SpikeScore (total)")
        if load:
            layers = len(routers(self.trainer.train_module.model))  # over which OLMo-core sums
            line["load_balance_loss"] = metrics[f"train/{LOAD_BALANCE}"] / layers
            line["router_z_loss"] = metrics[f"train/{ROUTER_Z}"] / layers
        self.report({**line, **load, **({} if spikes is None else {"spike_share": spikes})})


@dataclass
class Prune(Callback):  # type: ignore[misc]
    """Removes all checkpoints but the newest after each new one, also those that an earlier process wrote."""

    keep: int = 1

    def post_checkpoint_saved(self, path: Any) -> None:
        """Remove, once the new one is whole."""
        del path
        if get_rank() == 0:
            keep_newest(self.trainer.save_folder, self.keep)
