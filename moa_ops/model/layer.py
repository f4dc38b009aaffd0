"""``AdaptedLinear``: a linear of the base model that holds the slices of all adapters of the model.

Stacked storage, and what is trained. The adapters lie in two parameters, ``lora_A`` ``[E, r, in]`` and
``lora_B`` ``[E, out, r]``, so that one kernel call serves any routing. While one adapter is trained alone,
the stacks must not be what the optimiser holds: AdamW's weight decay and momentum change every element of a
parameter that has a gradient, zero or not, and the other adapters would drift. So the active adapter becomes
two parameters of its own, ``active_A`` ``[r, in]`` and ``active_B`` ``[out, r]``, which share memory with its
slice of the stacks: an in-place update lands in both. Whatever separates the two (conversion, deep copies,
loading) puts them together again in :meth:`AdaptedLinear.link`. They have the stacks' width r, also where
the adapter's rank is lower: FSDP takes contiguous parameters only, and what is beyond the rank is neither
read nor given a gradient.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_ops import functional
from moa_ops.linear import MoALinear
from moa_ops.model import context
from moa_ops.model.adapter import LoraFactors
from moa_ops.model.targets import Target
from moa_ops.routing import Routing

_ACTIVE = ("active_A", "active_B")


@dataclass(frozen=True)
class Slot:
    """One adapter in one layer: its rank (0: not in this layer), its alpha, and what it is scaled with."""

    r: int = 0
    lora_alpha: float = 0.0
    use_rslora: bool = False
    scale: float = 1.0

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        if not self.r:
            return 0.0
        return self.scale * self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class AdaptedLinear(MoALinear):
    """A :class:`~moa_ops.MoALinear` without a router; its adapters differ in rank and scale, come and go.

    Made by :class:`~moa_ops.model.MoAModel`. The decision comes from the call in progress
    (:mod:`moa_ops.model.context`); outside of one the layer computes its base alone.

    Attributes:
        path: its name in the base model; block: the path of the block it is in, or ``None``.
        slots: one :class:`Slot` per adapter.
        active: the adapter trained alone, or ``None``.
        in_use: whether some adapter has a rank here.
    """

    in_use: bool
    expert_scaling: Tensor | None
    expert_ranks: Tensor | None

    def __init__(self, target: Target, lora_dropout: float = 0.0, widen: bool = True) -> None:
        nn.Module.__init__(self)
        device, dtype = self._wrap_base(target.module, None)
        if widen and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        self.in_features, self.out_features = target.in_features, target.out_features
        self.path, self.block = target.path, target.block
        inside = self.path[len(self.block or "") :].split(".")
        self.in_list = any(part.isdigit() for part in inside)  # one of several alike, as experts are
        self.lora_dropout = lora_dropout
        self.router = None
        self.slots: list[Slot] = []
        self.active: int | None = None
        empty = torch.empty(0, device=device, dtype=dtype)
        self.lora_A = nn.Parameter(empty.view(0, 0, 1).expand(0, 0, self.in_features), requires_grad=False)
        self.lora_B = nn.Parameter(empty.view(0, 1, 0).expand(0, self.out_features, 0), requires_grad=False)
        self._describe()

    # --------------------------------------------------------------------------------------------- adapters

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.slots)

    @property
    def r(self) -> int:
        """The largest rank, which the stacks are made for."""
        return self.lora_A.shape[1]

    def factors(self, expert: int) -> LoraFactors | None:
        """Views of one adapter's A and B with its alpha, without its scale; ``None`` at rank 0."""
        slot = self.slots[expert]
        if not slot.r:
            return None
        return LoraFactors(*self._slice(expert), slot.lora_alpha, slot.use_rslora)

    def insert(self, expert: int, factors: LoraFactors | None) -> None:
        """A new adapter at position ``expert``; ``None``: it is not in this layer."""
        kept: list[int | None] = list(range(len(self.slots)))
        kept.insert(expert, None)
        self._restack(kept, {expert: factors})

    def remove(self, expert: int) -> None:
        """Takes an adapter away; those after it move up."""
        self._restack([e for e in range(len(self.slots)) if e != expert], {})

    def set(self, expert: int, factors: LoraFactors | None) -> None:
        """Other factors for an adapter, in place where the stacks have room; its scale stays."""
        slot, scale = _slot(factors), self.slots[expert].scale
        if slot.r <= self.r and self.active != expert:
            self._write(expert, factors)
            self.slots[expert] = replace(slot, scale=scale)
            self._describe()
            return
        kept: list[int | None] = [None if e == expert else e for e in range(len(self.slots))]
        self._restack(kept, {expert: factors})
        self.set_scale(expert, scale)

    def set_scale(self, expert: int, scale: float) -> None:
        """Multiplies what the adapter adds, beside alpha and rank."""
        self.slots[expert] = replace(self.slots[expert], scale=scale)
        self._describe()

    def activate(self, expert: int | None) -> None:
        """Makes one adapter's slice a parameter of its own (see the top of the module), or none."""
        for name in _ACTIVE:
            self._parameters.pop(name, None)
        self.active = expert
        if expert is not None and self.slots[expert].r:
            for name, part in zip(_ACTIVE, self._rows(expert), strict=True):
                self.register_parameter(name, nn.Parameter(part))

    def link(self) -> None:
        """Puts the active adapter's parameters and its slice of the stacks into the same memory again.

        The parameters win: they are what an optimiser updates.
        """
        if "active_A" not in self._parameters:
            return
        if is_sharded(self.lora_A):
            self._link_shards(to_stacks=True)
            return
        for name, part in zip(_ACTIVE, self._rows(self.active), strict=True):
            parameter = self._parameters[name]
            if parameter.data_ptr() != part.data_ptr() or parameter.device != part.device:
                part.copy_(parameter.data)
                parameter.data = part

    def _link_shards(self, *, to_stacks: bool) -> None:
        """What :meth:`link` does, or its inverse, where FSDP2 has the parameters in shards, by copying.

        All processes must call it.
        """
        from torch.distributed.tensor import distribute_tensor

        for stack, parameter in ((self.lora_A, self.active_A), (self.lora_B, self.active_B)):
            whole, active = stack.full_tensor(), parameter.full_tensor()
            if to_stacks:
                whole[self.active] = active
            source, target = (whole, stack) if to_stacks else (whole[self.active], parameter)
            shard = distribute_tensor(source, target.device_mesh, target.placements)
            target.to_local().copy_(shard.to_local())

    def _rows(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.lora_A.data[expert], self.lora_B.data[expert]

    def _slice(self, expert: int) -> tuple[Tensor, Tensor]:
        r = self.slots[expert].r
        return self.lora_A.data[expert, :r], self.lora_B.data[expert, :, :r]

    def _write(self, expert: int, factors: LoraFactors | None) -> None:
        A, B = self.lora_A.data[expert], self.lora_B.data[expert]
        r = factors.r if factors is not None else 0
        A[r:].zero_()
        B[:, r:].zero_()
        if factors is not None:
            A[:r].copy_(factors.A)
            B[:, :r].copy_(factors.B)

    def _restack(self, sources: Sequence[int | None], new: Mapping[int, LoraFactors | None]) -> None:
        """New stacks: expert e is old expert ``sources[e]``, or where that is None ``new[e]``."""
        self.link()
        active, self.active = self.active, None
        old_A, old_B, old_slots = self.lora_A, self.lora_B, self.slots
        self.slots = [_slot(new[e]) if s is None else old_slots[s] for e, s in enumerate(sources)]
        r = max((slot.r for slot in self.slots), default=0)
        for name, old, shape in (
            ("lora_A", old_A, (len(sources), r, self.in_features)),
            ("lora_B", old_B, (len(sources), self.out_features, r)),
        ):
            self._parameters[name] = nn.Parameter(old.data.new_empty(shape), old.requires_grad)
        for e, source in enumerate(sources):
            if source is None:
                self._write(e, new[e])
                continue
            rank = old_slots[source].r
            factors = LoraFactors(old_A.data[source, :rank], old_B.data[source, :, :rank], 0.0)
            self._write(e, factors)
        self.activate(sources.index(active) if active is not None and active in sources else None)
        self._describe()

    def _describe(self) -> None:
        """Scales and ranks as the kernels take them: numbers where all adapters agree, tensors otherwise."""
        device = self.lora_A.device
        scales = [slot.scaling for slot in self.slots]
        ranks = [slot.r for slot in self.slots]
        self.in_use = any(ranks)
        used = {scale for scale, rank in zip(scales, ranks, strict=True) if rank}
        self.scaling = next(iter(used)) if len(used) == 1 else 1.0
        self.expert_scaling = torch.tensor(scales, device=device) if len(used) > 1 else None
        self.expert_ranks = (
            torch.tensor(ranks, dtype=torch.int32, device=device) if len(set(ranks)) > 1 else None
        )

    # --------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """``[..., in]`` to ``[..., out]`` by the decision of the call in progress, or by ``routing``."""
        if routing is None:
            call = context.current()
            if call is None:
                if self.slots:
                    context.check_not_recomputing(self.path)
                return self.base(x)
            if call.single is not None:
                return self._forward_single(x, call)
            routing = call.routing(self, x) if self.in_use else None
        if routing is None:
            return self.base(x)
        scaling = self.scaling if self.expert_scaling is None else self.expert_scaling
        return self._mixture(x, self.lora_A, self.lora_B, routing, scaling, self.expert_ranks)

    def base(self, x: Tensor) -> Tensor:
        """The base alone, as it was before adapters came."""
        return F.linear(x, self.weight, self.bias) if self.base_layer is None else self.base_layer(x)

    def _forward_single(self, x: Tensor, call: context.Call) -> Tensor:
        """One adapter for every token: a mixture of one, over parameters of its own where it is active."""
        expert = call.single
        slot = self.slots[expert]
        if not slot.r:
            return self.base(x)
        if self.active == expert:
            lora_A, lora_B = self.active_A[None], self.active_B[None]
        else:
            lora_A, lora_B = self.lora_A[expert : expert + 1], self.lora_B[expert : expert + 1]
        ranks = None if self.expert_ranks is None else self.expert_ranks[expert : expert + 1]
        return self._mixture(x, lora_A, lora_B, call.all_to_one(x), slot.scaling, ranks)

    def _mixture(
        self,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        routing: Routing,
        scaling: float | Tensor,
        ranks: Tensor | None,
    ) -> Tensor:
        dropped = self.lora_dropout > 0 and self.training
        if self._modules["base_layer"] is None and not dropped:
            lora = (lora_A, lora_B, routing, scaling, ranks)
            return functional.mixture(x, self.weight, self.bias, None, *lora)
        base = self.base(x)
        x = F.dropout(x, self.lora_dropout) if dropped else x
        return functional.segment_lora(
            x.to(base.dtype), lora_A, lora_B, routing, scaling=scaling, ranks=ranks, base=base
        )

    # -------------------------------------------------------------------------------------------- conversions

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        self.link()
        super()._apply(fn, recurse)
        self.link()
        self._describe()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a deep copy, or of a pickle
        self.link()

    @torch.no_grad()
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.link()
        active = {} if whole_state_wanted() else self._pop_active()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters.update(active)

    @torch.no_grad()
    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        active = {} if prefix + _ACTIVE[0] in state else self._pop_active()
        try:
            super()._load_from_state_dict(state, prefix, *args)
        finally:
            self._parameters.update(active)
            if active and is_sharded(self.lora_A):
                self._link_shards(to_stacks=False)
            elif active:
                for parameter, part in zip(active.values(), self._rows(self.active), strict=True):
                    parameter.data = part  # what was loaded wins
            self._describe()

    def _pop_active(self) -> dict[str, nn.Parameter]:
        return {name: self._parameters.pop(name) for name in _ACTIVE if name in self._parameters}

    def extra_repr(self) -> str:
        """Sizes and ranks, for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"ranks={[slot.r for slot in self.slots]}"
        )


def whole_state_wanted() -> bool:
    """Whether accelerate's FSDP takes the model from ``state_dict`` on one process, to send it to the others:
    then every parameter must be in it, and nothing else.
    """
    return os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("1", "true")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is spread over processes, as FSDP2's parameters are."""
    return hasattr(tensor, "full_tensor")  # a DTensor; torch may be built without torch.distributed


def _slot(factors: LoraFactors | None) -> Slot:
    return Slot() if factors is None else Slot(factors.r, factors.lora_alpha, factors.use_rslora)
