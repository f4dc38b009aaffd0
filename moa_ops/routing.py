"""``Routing``: which experts every token goes to, decided once and shared by every linear that sees the
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moa_ops import ops  # noqa: F401  (defines the operators)


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """A routing decision for T tokens, k of E experts each, together with its slots sorted by expert.

    weights: ``[T, k]`` float32 (float64 for float64 logits): gate weights, differentiable.
    indices: ``[T, k]`` int64: expert ids, best first; -1 where a slot has no adapter.
    expert_offsets: ``[E + 1]`` int32: where each expert's segment starts in ``order``.
    order: ``[T·k]`` int32: the flat slots t·k + j sorted by expert, stable; slots of -1 come last.
    num_experts: E.
    """

    weights: Tensor
    indices: Tensor
    expert_offsets: Tensor
    order: Tensor
    num_experts: int

    @classmethod
    def from_indices(
        cls,
        indices: Tensor | Sequence[int] | Sequence[Sequence[int]],
        weights: Tensor | None = None,
        *,
        num_experts: int,
    ) -> Routing:
        """Route by given ids.

        indices: ``[T]`` or ``[T, k]`` integers in ``[-1, num_experts)``, -1 for no adapter. An id that occurs
            twice in a row counts twice: the row gets the sum of both weights.
        weights: same shape, floating; kept differentiable. By default 1 (and 0 where the id is -1, which no
            kernel reads).

        Raises ``TypeError`` for ids that are no integers, ``ValueError`` for shapes that differ and for
        num_experts < 1, and an error naming the id for one out of range.
        """
        if not isinstance(indices, Tensor):
            indices = torch.as_tensor(indices, dtype=None if len(indices) else torch.int64)
        if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers (expert ids), got {indices.dtype}")
        if indices.dim() not in (1, 2):
            raise ValueError(f"indices must be [T] or [T, k], got shape {list(indices.shape)}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        if weights is None:
            weights = (indices >= 0).to(torch.float32)
        elif weights.shape != indices.shape:
            raise ValueError(
                f"weights must have the shape of indices, {list(indices.shape)}, got {list(weights.shape)}"
            )
        elif not weights.dtype.is_floating_point:
            raise TypeError(f"weights must be floating, got {weights.dtype}")
        elif weights.dtype not in (torch.float32, torch.float64):
            weights = weights.float()
        if indices.dim() == 1:
            indices, weights = indices.unsqueeze(1), weights.unsqueeze(1)
        indices = indices.to(torch.int64).contiguous()
        return cls(weights, indices, *torch.ops.moa_ops.sort_by_expert(indices, num_experts), num_experts)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.indices.shape[0]

    @property
    def top_k(self) -> int:
        """k."""
        return self.indices.shape[1]

    def repeat(self, repeats: int, mask: Tensor | None = None) -> Routing:
        """Give every row's decision to ``repeats`` consecutive tokens: one row per sequence.

        mask: ``[T, repeats]`` bool; tokens where it is False (padding) get index -1 and weight 0.
        """
        rows = self.indices.shape[0]
        if repeats < 0:
            raise ValueError(f"repeats must be at least 0, got {repeats}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (rows, repeats)):
            raise ValueError(
                f"mask must be bool of shape {[rows, repeats]} (rows, repeats), "
                f"got {mask.dtype} of shape {list(mask.shape)}"
            )
        weights = self.weights.unsqueeze(1).expand(-1, repeats, -1)
        indices = self.indices.unsqueeze(1).expand(-1, repeats, -1)
        if mask is not None:
            weights = torch.where(mask.unsqueeze(-1), weights, 0.0)
            indices = torch.where(mask.unsqueeze(-1), indices, -1)
        indices = indices.reshape(rows * repeats, self.top_k)
        weights = weights.reshape(rows * repeats, self.top_k)
        expert_offsets, order = torch.ops.moa_ops.sort_by_expert(indices, self.num_experts)
        return Routing(weights, indices, expert_offsets, order, self.num_experts)

    def to(self, device: torch.device | str) -> Routing:
        """The same decision on another device."""
        moved = (self.weights, self.indices, self.expert_offsets, self.order)
        return Routing(*(tensor.to(device) for tensor in moved), self.num_experts)


_TENSORS = tuple(field.name for field in fields(Routing) if field.name != "num_experts")


def _flatten(routing: Routing) -> tuple[list[Tensor], int]:
    return [getattr(routing, name) for name in _TENSORS], routing.num_experts


def _flatten_with_keys(routing: Routing) -> tuple[list[tuple[pytree.GetAttrKey, Tensor]], int]:
    return [(pytree.GetAttrKey(name), getattr(routing, name)) for name in _TENSORS], routing.num_experts


def _unflatten(tensors: Sequence[Tensor], num_experts: int) -> Routing:
    return Routing(*tensors, num_experts)


# As a pytree, a Routing passes through torch.compile, torch.export, torch.func and other maps over tensors.
pytree.register_pytree_node(
    Routing,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="moa_ops.Routing",
)
