"""Merging adapters: one layer's updates ΔW_i = s_i B_i A_i become one, ΔW = B A.

| combination_type | ΔW | rank |
|---|---|---|
| ``cat``, ``linear`` | Σ w_i ΔW_i, exactly | Σ r_i; ``linear`` also takes svd_rank |
| ``svd`` | the best approximation of Σ w_i ΔW_i | svd_rank, by default the largest r_i |
| ``magnitude_prune`` | Σ w_i top(ΔW_i) | the same |
| ``dare_linear`` | Σ w_i drop(ΔW_i) | the same |
| ``ties`` | mean over those that agree in sign with Σ top(ΔW_i), of w_i top(ΔW_i) | the same |
| ``dare_ties`` | the same with drop | the same |

top keeps the ``density`` largest magnitudes of a matrix, drop keeps entries at random with probability
``density`` and divides them by it. All act on ΔW itself: applied to A and B apart, as PEFT's types without
"_svd" do, sums have cross terms B_i A_j. The names with "_svd" are accepted as synonyms.
Sources: TIES (arXiv 2306.01708), DARE (2311.03099).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moa_ops.model.adapter import LoraAdapter, LoraFactors

COMBINATION_TYPES = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_MAJORITY = ("total", "frequency")


def merge_adapters(
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    combination_type: str = "linear",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> LoraAdapter:
    """One adapter from several; layers that only some have are merged from those.

    weights: one per adapter, of any sign. The other arguments are those of :func:`merge_factors`, and raise
    the same errors. ``dare_*`` draws for each layer from ``seed`` and the layer's path, so that the result
    depends on neither the order of the layers nor the global generator.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"give one weight per adapter; got {len(adapters)} adapters, {len(weights)} weights")
    merged: dict[str, LoraFactors] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        present = [(a.modules[path], w) for a, w in zip(adapters, weights, strict=True) if path in a.modules]
        factors, used = zip(*present, strict=True)
        merged[path] = merge_factors(
            factors,
            used,
            combination_type,
            svd_rank=svd_rank,
            density=density,
            majority_sign_method=majority_sign_method,
            seed=_seed(seed, path),
        )
    first = adapters[0]
    return LoraAdapter(merged, first.lora_dropout, first.fan_in_fan_out, first.notes)


def merge_factors(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    combination_type: str = "linear",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> LoraFactors:
    """One layer's update from several, with scaling 1, in the widest dtype of the given ones.

    factors: of any ranks, alphas and scaling rules, for a layer of one shape.
    combination_type: see the table at the top of the module.
    svd_rank: the rank of the result where it is an approximation; at most min(in, out).
    density: the share of entries kept, in (0, 1]; of ties, dare_* and magnitude_prune.
    majority_sign_method: "total": the sign of the sum; "frequency": of the sum of signs.
    seed: of dare_*.

    Raises ``ValueError`` for options out of range or that the type does not use, and for shapes that differ.
    """
    kind = _check(factors, weights, combination_type, svd_rank, density, majority_sign_method)
    dtype = factors[0].A.dtype
    for f in factors:
        dtype = torch.promote_types(dtype, torch.promote_types(f.A.dtype, f.B.dtype))
    rank = svd_rank
    if rank is None and kind not in ("cat", "linear"):
        rank = min(max(f.r for f in factors), *_shape(factors[0]))
    if kind in _SPARSE:
        wide = torch.promote_types(dtype, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        delta = _sparse_sum(
            [f.delta(wide) for f in factors], weights, kind, density, majority_sign_method, generator
        )
        A, B = factorise(delta, rank)
    else:
        A, B = concatenate(factors, weights)
        if rank is not None:
            A, B = truncate(A, B, rank)
    return LoraFactors(A.to(dtype), B.to(dtype), lora_alpha=A.shape[0])


def concatenate(factors: Sequence[LoraFactors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A ``[Σr, in]`` and B ``[out, Σr]`` with B A = Σ w_i ΔW_i exactly, in at least float32.

    The factor w_i s_i is shared between both sides as its root, so that neither is large where the other is
    small; its sign goes to B.
    """
    rows, columns = [], []
    for f, weight in zip(factors, weights, strict=True):
        dtype = torch.promote_types(torch.promote_types(f.A.dtype, f.B.dtype), torch.float32)
        factor = weight * f.scaling
        root = abs(factor) ** 0.5
        rows.append(f.A.to(dtype) * root)
        columns.append(f.B.to(dtype) * (root if factor >= 0 else -root))
    return torch.cat(rows), torch.cat(columns, dim=1)


def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of this rank, A ``[rank, in]``, B ``[out, rank]``, in float64.

    B = Q_b R_b and Aᵀ = Q_a R_a, so the singular values of B A are those of the small R_b R_aᵀ: nothing of
    the size ``[out, in]`` is formed.
    """
    Q_b, R_b = torch.linalg.qr(B.double())
    Q_a, R_a = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
    A, B = _split(U, S, Vh, rank)
    return _pad(A @ Q_a.mT, Q_b @ B, rank)


def factorise(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ΔW ``[out, in]`` of this rank, as A ``[rank, in]`` and B ``[out, rank]``."""
    return _pad(*_split(*torch.linalg.svd(delta, full_matrices=False), rank), rank)


def _split(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def _pad(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Zeros up to the rank asked for, where ΔW has less."""
    missing = rank - A.shape[0]
    return torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))


# -------------------------------------------------------------------------------------- on ΔW, entry by entry


def _sparse_sum(
    deltas: list[Tensor],
    weights: Sequence[float],
    kind: str,
    density: float,
    majority_sign_method: str,
    generator: torch.Generator,
) -> Tensor:
    if kind.startswith("dare"):
        sparse = [drop_at_random(delta, density, generator) for delta in deltas]
    else:
        sparse = [keep_largest(delta, density) for delta in deltas]
    if kind.endswith("ties"):
        return _agreeing_mean(sparse, weights, majority_sign_method)
    total = torch.zeros_like(sparse[0])
    for delta, weight in zip(sparse, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """ΔW with all but its ⌊density · numel⌋ largest magnitudes set to zero; of equal ones the first stay."""
    kept = int(density * delta.numel())
    if kept == 0:
        return torch.zeros_like(delta)
    size = delta.abs().flatten()
    smallest = size.kthvalue(size.numel() - kept + 1).values
    keep, equal = size > smallest, size == smallest
    keep |= equal & (equal.cumsum(0) <= kept - keep.sum())
    return torch.where(keep.view_as(delta), delta, 0.0)


def drop_at_random(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """ΔW with every entry kept with probability ``density`` and divided by it, else zero (DARE)."""
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept.to(delta.device), delta / density, 0.0)


def _agreeing_mean(deltas: list[Tensor], weights: Sequence[float], majority_sign_method: str) -> Tensor:
    """Per entry the mean of w_i ΔW_i over the i whose sign is the elected one (TIES); zero is no sign."""
    votes = torch.zeros_like(deltas[0])
    for delta in deltas:
        votes += delta if majority_sign_method == "total" else delta.sign()
    elected = torch.where(votes >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign() == elected
        total += torch.where(agrees, weight * delta, 0.0)
        count += agrees
    return total / count.clamp(min=1)


# -------------------------------------------------------------------------------------------- learned weights


def learn_weights(
    loss: Callable[[Tensor], Tensor],
    initial: Sequence[float] | Tensor,
    *,
    steps: int = 50,
    lr: float = 0.05,
    l1: float = 0.0,
) -> Tensor:
    """Mixing weights ``[N]`` that minimise ``loss(weights) + l1 · Σ|w|``, by Adam from ``initial``.

    loss: maps float32 weights ``[N]`` to a differentiable scalar; it is called ``steps + 1`` times and may
        look at another batch every time.

    Returns the weights with the lowest value seen (the initial ones among them), detached.
    Raises ``ValueError`` where the loss does not depend on the weights or is not finite.
    """
    weights = torch.as_tensor(initial, dtype=torch.float32).clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=lr)
    best, best_value = weights.detach().clone(), float("inf")
    for step in range(steps + 1):
        value = loss(weights)
        if not value.requires_grad:
            raise ValueError("the loss does not depend on the weights; compute it under torch.enable_grad()")
        value = value + l1 * weights.abs().sum()
        if not value.isfinite():
            raise ValueError(f"the loss is {value.item()} at weights {weights.tolist()}; try a lower lr")
        if value.item() < best_value:
            best, best_value = weights.detach().clone(), value.item()
        if step < steps:
            (weights.grad,) = torch.autograd.grad(value, weights)
            optimizer.step()
    return best


# ----------------------------------------------------------------------------------------------------- checks


def _check(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> str:
    """The combination type without "_svd"; raises ValueError for anything that does not fit it."""
    kind = combination_type.removesuffix("_svd")
    if kind not in COMBINATION_TYPES:
        raise ValueError(
            f"combination_type must be one of {list(COMBINATION_TYPES)}, got {combination_type!r}"
        )
    if len(factors) != len(weights) or not factors:
        raise ValueError(f"give one weight per adapter; got {len(factors)} adapters, {len(weights)} weights")
    if not torch.tensor(list(weights), dtype=torch.float64).isfinite().all():
        raise ValueError(f"weights must be finite, got {list(weights)}")
    shapes = {_shape(f) for f in factors}
    if len(shapes) > 1:
        raise ValueError(f"the adapters are for layers of different shapes [out, in]: {sorted(shapes)}")
    if svd_rank is not None and kind == "cat":
        raise ValueError("cat keeps all ranks; for a lower one use combination_type='svd' with svd_rank")
    if svd_rank is not None and not 1 <= svd_rank <= min(*_shape(factors[0])):
        raise ValueError(
            f"svd_rank must lie in [1, {min(*_shape(factors[0]))}] for a layer {list(_shape(factors[0]))}, "
            f"got {svd_rank}"
        )
    if kind in _SPARSE:
        if density is None or not 0.0 < density <= 1.0:
            raise ValueError(f"{kind} needs density, the share of entries to keep, in (0, 1]; got {density}")
    elif density is not None:
        raise ValueError(f"{kind} keeps every entry; density is for {list(_SPARSE)}")
    if majority_sign_method not in _MAJORITY:
        raise ValueError(
            f"majority_sign_method must be one of {list(_MAJORITY)}, got {majority_sign_method!r}"
        )
    return kind


def _shape(factors: LoraFactors) -> tuple[int, int]:
    """[out, in] of the layer."""
    return factors.B.shape[0], factors.A.shape[1]


def _seed(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:7], "big")
