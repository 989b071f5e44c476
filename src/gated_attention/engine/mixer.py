"""Gated attention as a sequence mixer of OLMo-core, built from a `BlockSpec`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from olmo_core.distributed.parallel.context_parallel import all_to_all_single_cp2hp, all_to_all_single_hp2cp
from olmo_core.nn.attention import Attention
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer.init import InitMethod, init_linear
from olmo_core.nn.utils import get_tp_wrappers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from gated_attention import ops
from gated_attention.nn import GatedBlock
from gated_attention.nn.gate import GATE_MODULES
from gated_attention.spec import AttentionGeometry, BlockSpec, check_qk_norm

_OURS = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}
"""Names of OLMo-core's projections, and Hugging Face's, which the block's parts read."""

_BY_HEAD = ("q_proj", "k_proj", "v_proj", "switch_router", *GATE_MODULES.values())


class GatedSelfAttention(GatedBlock, Attention):  # type: ignore[misc]  # OLMo-core is untyped here
    """OLMo-core's attention with what a `BlockSpec` adds to it.

    Parameters have the names that they have in `GatedQwen3ForCausalLM`.

    Args:
        block: What the attention carries; sandwich norms and clipping are the decoder block's.
        options: Of OLMo-core's `Attention`.

    Attributes:
        watch: Told of every pass if set: the input (B, T, C), queries, keys and values (B, H or K, T, D), the mask.

    Raises:
        ValueError: if a gate is one that the norm of queries and keys cancels.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    backend: Any
    _apply_rope: Any

    def __init__(self, block: BlockSpec, **options: Any) -> None:
        check_qk_norm(block.gates)
        super().__init__(**options)
        self.watch: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None] | None = None
        del self.gate  # OLMo-core's own, None, in the place of the method
        for theirs, ours in _OURS.items():
            self.add_module(ours, self._modules.pop(theirs))
        geometry = AttentionGeometry(self.d_model, self.n_heads, self.n_kv_heads, self.head_dim)
        with torch.device(options.get("init_device", "cpu")):
            self.add_block(block, geometry, options["qk_norm"].eps)

    def forward(
        self,
        x: Tensor,
        cu_doc_lens: Tensor | None = None,
        max_doc_len: int | None = None,
        pos_sin: Tensor | None = None,
        pos_cos: Tensor | None = None,
    ) -> Tensor:
        """Causal attention within `x` (B, T, C), or within each of its documents.

        Args:
            cu_doc_lens: Starts of the documents in the flattened batch, and its length.
            max_doc_len: Unused: the mask follows from `cu_doc_lens`.
            pos_sin: This rank's rotary buffers, under context parallelism.
            pos_cos: As `pos_sin`.
        """
        q, k, v, logits = self.project_heads(x)  # (B, T, H or K, D); (B, T, H, 1) or None
        q, k = self._apply_rope(q, k, None, pos_sin, pos_cos, None, cu_doc_lens)
        group = self.backend.cp_pg if self.cp_enabled else None
        if group is not None:
            if cu_doc_lens is not None:
                raise ValueError("context parallelism does not keep documents apart; train without document masks")
            q, k, v = (all_to_all_single_cp2hp(heads, group) for heads in (q, k, v))  # whole T, some of the heads
        mask = None if cu_doc_lens is None else document_mask(cu_doc_lens, *q.shape[:2])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if self.watch is not None:
            self.watch(x, q, k, v, mask)
        if self.fused_gate is not None and group is None:
            logits = self.gate_logits(self.fused_gate, x) if logits is None else logits
            y = ops.gated_attention(q, k, v, logits, mask=mask)
        else:
            y, lse = ops.attention(q, k, v, mask=mask)
            y = y.transpose(1, 2)  # (B, T, H, D)
            if group is not None:
                y = all_to_all_single_hp2cp(y.contiguous(), group)
                lse = all_to_all_single_hp2cp(lse.transpose(1, 2).contiguous(), group).transpose(1, 2)
            y = self.gate_heads(y, x, lse, logits)
        return self.project_output(y, x)

    def apply_tp(
        self,
        tp_mesh: DeviceMesh,
        input_layout: Placement | None = None,
        output_layout: Placement | None = None,
        use_local_output: bool = True,
        float8_enabled: bool = False,
    ) -> None:
        """Share heads, and the gates on them, among the ranks of a mesh.

        Raises:
            ValueError: for a gate that needs every head on every rank.
        """
        for spec in self.gates:
            if spec.site == "output" or spec.head_shared:
                raise ValueError(f"tensor parallelism does not take {spec.describe()}, which reads all heads; use FSDP")
        rowwise, colwise, prepare = get_tp_wrappers(float8_enabled=float8_enabled)
        layouts = None if input_layout is None else (input_layout,)
        parallelize_module(self, tp_mesh, prepare(input_layouts=layouts, desired_input_layouts=(Replicate(),)))
        plan: dict[str, Any] = {name: colwise() for name in _BY_HEAD}
        plan["o_proj"] = rowwise(output_layouts=output_layout, use_local_output=use_local_output)
        plan |= {name: SequenceParallel(sequence_dim=2, use_local_output=True) for name in ("q_norm", "k_norm")}
        plan["sdpa_norm"] = _RowsOfHeads()
        if self.reads_lse:
            plan[GATE_MODULES["sdpa"]] = _RowsOfHeads()
        parallelize_module(self, tp_mesh, {name: style for name, style in plan.items() if name in self._modules})

    @torch.no_grad()
    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise projections as OLMo-core's `normal`, and gates as their specs say.

        Raises:
            ValueError: for another method.
        """
        if init_method != InitMethod.normal:
            raise ValueError(f"init_method is {str(init_method)!r}; gated attention is initialised by 'normal'")
        names = [name for name in (*_OURS.values(), "switch_router") if name in self._modules]
        for linear in (self.get_submodule(name) for name in names):
            init_linear(cast(nn.Linear, linear), std=std, generator=generator)
        for spec, module in self.gate_modules():
            if spec.input == "lse":
                continue  # OLMo-core has called its `reset_parameters`
            gate = cast(nn.Linear, module)
            init_linear(gate, std=std, generator=generator)
            if spec.init == "zeros":
                nn.init.zeros_(gate.weight)
            if spec.bias is not None:
                nn.init.constant_(gate.bias, spec.bias)


class _RowsOfHeads(SequenceParallel):
    """A module with a row of parameters for each head: every rank holds those of its heads."""

    def __init__(self) -> None:
        super().__init__(sequence_dim=2, use_local_output=True)

    def _replicate_module_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for row, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(row, nn.Parameter(distribute_tensor(parameter, device_mesh, [Shard(0)])))


@SequenceMixerConfig.register("gated_attention")
@dataclass
class GatedSelfAttentionConfig(SequenceMixerConfig):  # type: ignore[misc]
    """The configuration that builds a `GatedSelfAttention`.

    Attributes:
        norm: Of queries and keys, over each head.
        block: As for `GatedSelfAttention`.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RoPEConfig
    norm: LayerNormConfig
    block: BlockSpec = field(default_factory=BlockSpec)

    def num_params(self, d_model: int) -> int:
        """The parameters of one attention."""
        geometry = AttentionGeometry(d_model, self.n_heads, self.n_kv_heads, self.head_dim)
        projections = 2 * d_model * (self.n_heads + self.n_kv_heads) * self.head_dim
        return projections + 2 * self.head_dim + self.block.num_parameters(geometry)

    def build(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> GatedSelfAttention:
        """The module; the same in every layer."""
        return GatedSelfAttention(
            self.block,
            d_model=d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            bias=False,
            rope=self.rope,
            qk_norm=self.norm,
            use_head_qk_norm=True,
            init_device=init_device,
            cache=cache,
        )


def document_mask(cu_doc_lens: Tensor, batch: int, length: int) -> Tensor:
    """True where two tokens of a sequence are of the same document, (B, 1, T, T).

    Args:
        cu_doc_lens: As in `GatedSelfAttention.forward`.
    """
    positions = torch.arange(batch * length, device=cu_doc_lens.device, dtype=cu_doc_lens.dtype)
    documents = torch.bucketize(positions, cu_doc_lens[1:], right=True).view(batch, 1, length)
    return documents[..., :, None] == documents[..., None, :]
