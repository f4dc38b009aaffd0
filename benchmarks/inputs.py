"""The points that are measured, their floors, and the tensors at each: random, seeded, shared by all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moa_ops import MoALinear, Routing

LORA_ALPHA = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # error / norm of what may be timed


@dataclass(frozen=True)
class Shape:
    """T tokens through a layer in -> out with E experts of rank r, k of them per token."""

    tokens: int
    in_features: int
    out_features: int
    experts: int
    r: int = 16
    top_k: int = 2

    @property
    def label(self) -> str:
        widths = f"{self.in_features}→{self.out_features}"
        return f"T={self.tokens} {widths} E={self.experts}"

    @property
    def extra(self) -> float:
        """Arithmetic of router and mixture over that of the base: k·r·(in+out)/(in·out) + E/out."""
        i, o = self.in_features, self.out_features
        return self.top_k * self.r * (i + o) / (i * o) + self.experts / o

    @property
    def floor(self) -> float:
        """Layer / nn.Linear, if every operation cost the same: 1 + extra."""
        return 1 + self.extra

    @property
    def training_floor(self) -> float:
        """The base does its forward and dX; the mixture its forward and about twice that in the backward."""
        return (2 + 3 * self.extra) / 2

    @property
    def mixture_flop(self) -> int:
        """Of the chosen adapters alone, forward."""
        return 2 * self.tokens * self.top_k * self.r * (self.in_features + self.out_features)

    @property
    def adapter_values(self) -> int:
        """Elements of all A and B."""
        return self.experts * self.r * (self.in_features + self.out_features)


class Problem:
    """The tensors at one point. The mixture is about as large as the base, so that an error in it shows."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.dtype = shape, dtype
        generator = torch.Generator().manual_seed(seed)

        def randn(*size: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).to(device, dtype)

        E, r, i, o = shape.experts, shape.r, shape.in_features, shape.out_features
        self.x = randn(shape.tokens, i, scale=1)
        self.weight = randn(o, i, scale=1 / math.sqrt(i))
        self.lora_A = randn(E, r, i, scale=1 / math.sqrt(i))
        self.lora_B = randn(E, o, r, scale=1 / math.sqrt(r))
        self.router_weight = randn(E, i, scale=1 / math.sqrt(i), dtype=torch.float32)
        self.grad_y = randn(shape.tokens, o, scale=1)
        self.scaling = LORA_ALPHA / r

    @cached_property
    def linear(self) -> nn.Linear:
        """The base alone: frozen, without bias (as in the models people put LoRAs on)."""
        sizes = self.shape.in_features, self.shape.out_features
        linear = nn.Linear(*sizes, bias=False, dtype=self.dtype, device=self.x.device)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        return linear

    @cached_property
    def layer(self) -> MoALinear:
        """Ours over the same weight, by its public constructor."""
        shape = self.shape
        layer = MoALinear.from_linear(
            self.linear, num_experts=shape.experts, r=shape.r, lora_alpha=LORA_ALPHA, top_k=shape.top_k
        )
        with torch.no_grad():
            layer.lora_A.copy_(self.lora_A)
            layer.lora_B.copy_(self.lora_B)
            layer.router.weight.copy_(self.router_weight)
        return layer

    def expected(self) -> Tensor:
        """The layer's output in float64, from inputs as rounded as everyone's."""
        return self._forward64(self.x.double(), self.lora_A, self.lora_B, self.router_weight)

    def expected_gradients(self) -> dict[str, Tensor]:
        """Gradients of ``(y * grad_y).sum()`` in float64: x, lora_A, lora_B, router."""
        tensors = (self.x, self.lora_A, self.lora_B, self.router_weight)
        leaves = [tensor.double().requires_grad_() for tensor in tensors]
        y = self._forward64(*leaves)
        grads = torch.autograd.grad(y, leaves, self.grad_y.double())
        return dict(zip(("x", "lora_A", "lora_B", "router"), grads, strict=True))

    def _forward64(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, router: Tensor) -> Tensor:
        top, indices = (x @ router.double().t()).topk(self.shape.top_k)
        gates = x.new_zeros(self.shape.tokens, self.shape.experts)
        gates = gates.scatter(1, indices, top.softmax(-1)) * self.scaling
        y = x @ self.weight.double().t()
        for e in range(self.shape.experts):
            rows = (indices == e).any(1).nonzero().squeeze(1)
            h = x[rows] @ lora_A[e].double().t() * gates[rows, e, None]
            y = y.index_add(0, rows, h @ lora_B[e].double().t())
        return y

    def routing(self, popularity: str = "uniform") -> Routing:
        """Random distinct experts per token: "uniform", or "zipf": expert e with weight 1/(e+1)."""
        shape, generator = self.shape, torch.Generator().manual_seed(1)
        rank = torch.arange(1, shape.experts + 1, dtype=torch.float32)
        weights = 1 / rank if popularity == "zipf" else torch.ones_like(rank)
        indices = torch.multinomial(weights.expand(shape.tokens, -1), shape.top_k, generator=generator)
        gates = torch.rand(shape.tokens, shape.top_k, generator=generator).softmax(-1)
        return Routing.from_indices(indices, gates, num_experts=shape.experts)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value - expected‖ / ‖expected‖, in float64."""
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def check(name: str, value: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The relative error; raises if it is too large for the result to be worth timing."""
    error = relative_error(value, expected)
    if not error <= TOLERANCE[dtype]:
        raise ArithmeticError(f"{name} is off by {error:.1e} of the norm; allowed is {TOLERANCE[dtype]:.0e}")
    return error
