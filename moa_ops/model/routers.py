"""Routers: modules that give logits, one per expert, and whose rows come and go with the experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_ops.linear import Router
from moa_ops.model.adapter import LoraFactors
from moa_ops.model.layer import AdaptedLinear


class LinearRouter(Router):
    """Logits ``W x``. Rows of new experts are drawn small, so that none is preferred."""

    def __init__(self, in_features: int, num_experts: int, device: Any = None, **_: Any) -> None:
        super().__init__(in_features, num_experts, device)
        _draw(self.weight)

    @torch.no_grad()
    def separate(self, means: Tensor, margin: float) -> None:
        """Rows along the centred ``means`` ``[E, in]`` of each expert's inputs.

        They are scaled so that an expert's own mean gets ``margin`` more than the others, on average.
        """
        rows = means - means.mean(0)
        logits = means.to(rows.dtype) @ rows.t()
        own, experts = logits.diagonal().sum(), len(rows)
        gap = own / experts - (logits.sum() - own) / max(experts * (experts - 1), 1)
        self.weight.copy_(rows * (margin / gap.clamp(min=1e-12)))

    def reorder(self, sources: list[int | None]) -> None:
        """Row e becomes old row ``sources[e]``, bit for bit; a fresh one where that is ``None``."""
        self.weight = _rows(self.weight, sources)


class MLPRouter(nn.Module):
    """Logits ``W gelu(V x)``; its parameters stay in float32, as those of every router."""

    def __init__(self, in_features: int, num_experts: int, device: Any = None, hidden: int = 64, **_: Any):
        super().__init__()
        self.hidden = Router(in_features, hidden, device)
        self.hidden.reset_parameters()
        self.out = LinearRouter(hidden, num_experts, device)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in]`` to ``[N, E]`` in float32."""
        return self.out(F.gelu(self.hidden(x)))

    def reorder(self, sources: list[int | None]) -> None:
        """As :meth:`LinearRouter.reorder`."""
        self.out.reorder(sources)


class PrototypeRouter(LinearRouter):
    """Arrow (arXiv 2405.11157): ``|v_e·x|`` with v_e the direction that B_e A_e amplifies most."""

    def __init__(self, in_features: int, num_experts: int, device: Any = None, **_: Any) -> None:
        super().__init__(in_features, num_experts, device)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in]`` to ``[N, E]`` in float32."""
        return super().forward(x).abs()

    def reorder(self, sources: list[int | None]) -> None:
        """As :meth:`LinearRouter.reorder`; new rows are zero until :meth:`read` sets them."""
        self.weight = _rows(self.weight, sources, fresh=0.0)

    @torch.no_grad()
    def read(self, layer: AdaptedLinear) -> None:
        """Takes the prototypes from the layer's adapters as they are now."""
        for expert in range(layer.num_experts):
            self.weight[expert] = prototype(layer.factors(expert), self.weight.shape[1])


class StaticRouter(nn.Module):
    """The mean of all adapters, each times its weight, for every token: ``weight`` ``[E]``, 1 at first.

    As it is a mean, adapters that come and go leave the weights of the others as they are.
    """

    def __init__(self, in_features: int, num_experts: int, device: Any = None, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_experts, device=device))

    def reorder(self, sources: list[int | None]) -> None:
        """As :meth:`LinearRouter.reorder`; a new adapter's weight is 1."""
        self.weight = _rows(self.weight, sources, fresh=1.0)


KINDS = {"linear": LinearRouter, "mlp": MLPRouter, "prototype": PrototypeRouter, "static": StaticRouter}


def _draw(weight: Tensor) -> None:
    with torch.no_grad():
        weight.normal_(std=0.1 / weight.shape[1] ** 0.5)


def _rows(weight: nn.Parameter, sources: list[int | None], fresh: float | None = None) -> nn.Parameter:
    rows = weight.data.new_empty(len(sources), *weight.shape[1:])
    if fresh is None:
        _draw(rows)
    else:
        rows.fill_(fresh)
    for e, source in enumerate(sources):
        if source is not None:
            rows[e] = weight.data[source]
    return nn.Parameter(rows, weight.requires_grad)


@torch.no_grad()
def prototype(factors: LoraFactors | None, in_features: int) -> Tensor:
    """The top right singular vector of B A, ``[in]`` float32; zeros where B A is zero.

    With B = Q R and Aᵀ = P S, B A = Q (R Sᵀ) Pᵀ: only an r × r matrix is decomposed.
    """
    if factors is None:
        return torch.zeros(in_features)
    _, R = torch.linalg.qr(factors.B.double())
    P, S = torch.linalg.qr(factors.A.double().t())
    _, sizes, Vh = torch.linalg.svd(R @ S.t())
    return ((P @ Vh[0]) * (sizes[0] > 0)).float()
