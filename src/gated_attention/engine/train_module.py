"""OLMo-core's train module, which counts where routers send the tokens of a step before it trains on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from olmo_core.data.utils import split_batch
from olmo_core.train.train_module import TransformerTrainModule

from gated_attention.engine.experts import routers
from gated_attention.nn.routing import sum_over_ranks


class BalancedTrainModule(TransformerTrainModule):  # type: ignore[misc]  # OLMo-core is untyped here
    """OLMo-core's train module; a mixture of experts is balanced over the global batch, in any number of passes.

    A step of several passes runs its forward passes once more, without gradients: about a third of its time.
    """

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        """Gradients of one step."""
        found = routers(self.model)
        passes = split_batch(batch, self.rank_microbatch_size // batch["input_ids"].shape[1]) if found else []
        for router in found:
            router.begin(len(passes))
        if len(passes) > 1:
            self._set_model_mode("train")
            with torch.no_grad():
                for one in passes:
                    ids, _, options = self._prepare_batch({**one})
                    self.model_forward(ids, logits_to_keep=1, **options)
            counts = sum_over_ranks(torch.stack([router.counts for router in found if router.counts is not None]))
            for router, row in zip(found, counts, strict=True):
                router.counts = row
        super().train_batch(batch, dry_run=dry_run)

    @contextmanager
    def _train_microbatch_context(self, micro_batch_idx: int, num_micro_batches: int) -> Iterator[None]:
        for router in routers(self.model):
            router.begin_pass(micro_batch_idx)
        with super()._train_microbatch_context(micro_batch_idx, num_micro_batches):
            yield
