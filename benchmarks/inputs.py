"""The points that are measured, their floors, and the tensors at each: random, seeded, shared by all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moa_ops import MoALinear, Routing

LORA_ALPHA = 32
CACHE = 32 << 20  # bytes that a run of calls may keep in the last cache: less is not counted as traffic
POPULARITIES = ("uniform", "zipf", "one hot", "all distinct")
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
        words = [f"T={self.tokens}", f"{self.in_features}→{self.out_features}", f"E={self.experts}"]
        words += [f"r={self.r}"] if self.r != 16 else []
        words += [f"k={self.top_k}"] if self.top_k != 2 else []
        return " ".join(words)

    @property
    def extra(self) -> float:
        """Arithmetic of router and mixture over that of the base: k·r·(in+out)/(in·out) + E/out."""
        return self.extra_by_id + self.experts / self.out_features

    @property
    def extra_by_id(self) -> float:
        """That of the mixture alone, where nobody has to decide: k·r·(in+out)/(in·out)."""
        i, o = self.in_features, self.out_features
        return self.top_k * self.r * (i + o) / (i * o)

    @property
    def floor(self) -> float:
        """Layer / nn.Linear, if every operation cost the same: 1 + extra."""
        return floor(self.extra, train=False)

    @property
    def training_floor(self) -> float:
        """The same of a training step."""
        return floor(self.extra, train=True)

    def extra_bytes(self, size: int, train: bool = False) -> int:
        """What router and mixture must move beyond the base's x and y: adapters that are chosen, the router.

        size: bytes of a value. Training reads them twice and writes gradients of all of them.
        """
        router = 4 * self.experts * self.in_features
        used = size * self.adapter_values * min(self.experts, self.tokens * self.top_k) // self.experts
        return 3 * router + 2 * used + size * self.adapter_values if train else router + used

    @property
    def base_flop(self) -> int:
        """Of the plain layer, forward."""
        return 2 * self.tokens * self.in_features * self.out_features

    @property
    def mixture_flop(self) -> int:
        """Of the chosen adapters alone, forward."""
        return 2 * self.tokens * self.top_k * self.r * (self.in_features + self.out_features)

    @property
    def adapter_values(self) -> int:
        """Elements of all A and B."""
        return self.experts * self.r * (self.in_features + self.out_features)


def floor(extra: float, train: bool) -> float:
    """The least time over the base's if all arithmetic costs the same, ``extra`` beside that of the base.

    In training the base does its forward and dX, the mixture its forward and about twice that backward.
    """
    return (2 + 3 * extra) / 2 if train else 1 + extra


class Problem:
    """The tensors at one point. The mixture is about as large as the base, so that an error in it shows."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.dtype = shape, dtype
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*size: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

        E, r, i, o = shape.experts, shape.r, shape.in_features, shape.out_features
        self.x = randn(shape.tokens, i, scale=1)
        self.weight = randn(o, i, scale=1 / math.sqrt(i))
        self.lora_A = randn(E, r, i, scale=1 / math.sqrt(i))
        self.lora_B = randn(E, o, r, scale=1 / math.sqrt(r))
        self.router_weight = randn(E, i, scale=1 / math.sqrt(i), dtype=torch.float32)
        self.grad_y = randn(shape.tokens, o, scale=1)
        self.scaling = LORA_ALPHA / r
        self._avoid_ties(randn)

    def _avoid_ties(self, randn: Callable[..., Tensor]) -> None:
        """Draws tokens anew until rounding cannot change which experts they choose, nor their order."""
        count = min(self.shape.top_k + 1, self.shape.experts)
        while True:
            top = (self.x.float() @ self.router_weight.t()).topk(count).values
            close = (top.diff(dim=1).abs() < 1e-4).any(1)
            if not close.any():
                return
            self.x[close] = randn(int(close.sum()), self.shape.in_features, scale=1)

    @cached_property
    def lora_Bt(self) -> Tensor:
        """B as ``[E, r, out]``."""
        return self.lora_B.transpose(1, 2).contiguous()

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # top-1 renormalised: its router learns nothing
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
        return self._mixture64(train=False)["y"].addmm_(self.x.double(), self.weight.double().t())

    def expected_gradients(self) -> dict[str, Tensor]:
        """Gradients of ``(y * grad_y).sum()`` in float64: x, lora_A, lora_B, router."""
        found = self._mixture64(train=True)
        found["x"].addmm_(self.grad_y.double(), self.weight.double())
        return {name: found[name] for name in ("x", "lora_A", "lora_B", "router")}

    def _mixture64(self, train: bool) -> dict[str, Tensor]:
        """The mixture's y and, for training, its gradients, by autograd expert for expert: little memory, and
        only those that have tokens.
        """
        with torch.set_grad_enabled(train):
            x, router = (t.double().requires_grad_(train) for t in (self.x, self.router_weight))
            top, indices = (x @ router.t()).topk(self.shape.top_k)
            gates = top.softmax(-1) * self.scaling
            y = x.new_zeros(self.grad_y.shape)
            dx, dgates = torch.zeros_like(x), torch.zeros_like(gates)
            dA, dB = (y.new_zeros(t.shape if train else 0) for t in (self.lora_A, self.lora_B))
            for e in indices.unique().tolist():
                rows, slots = (indices == e).nonzero(as_tuple=True)
                leaves = x.detach()[rows], self.lora_A[e].double(), self.lora_B[e].double()
                leaves += (gates.detach()[rows, slots],)
                x_e, a, b, gate = (leaf.requires_grad_(train) for leaf in leaves)
                y_e = (x_e @ a.t() * gate[:, None]) @ b.t()
                y.index_add_(0, rows, y_e.detach())
                if train:
                    grads = torch.autograd.grad(y_e, (x_e, a, b, gate), self.grad_y[rows].double())
                    dx.index_add_(0, rows, grads[0])
                    dA[e], dB[e] = grads[1], grads[2]
                    dgates[rows, slots] = grads[3]
            if not train:
                return {"y": y}
            by_router, drouter = torch.autograd.grad(gates, (x, router), dgates)
        return {
            "y": y,
            "x": dx.add_(by_router),
            "lora_A": dA,
            "lora_B": dB,
            "router": drouter,
        }

    def routing(self, popularity: str = "uniform") -> Routing:
        """Experts by id, distinct within a token, with random gates.

        popularity: "uniform"; "zipf": expert e with weight 1/(e+1); "one hot": the first k for every token;
        "all distinct": the next k for every token, so that no two share one as long as there are enough.
        """
        shape, generator = self.shape, torch.Generator().manual_seed(1)
        T, E, k = shape.tokens, shape.experts, shape.top_k
        if popularity == "one hot":
            indices = torch.arange(k).repeat(T, 1)
        elif popularity == "all distinct":
            indices = torch.arange(T * k).remainder(E).view(T, k)
        elif popularity in ("uniform", "zipf"):
            rank = torch.arange(1, E + 1, dtype=torch.float32)
            weights = 1 / rank if popularity == "zipf" else torch.ones_like(rank)
            indices = torch.multinomial(weights.expand(T, -1), k, generator=generator)
        else:
            raise ValueError(f"popularity is one of {', '.join(POPULARITIES)}; got {popularity!r}")
        gates = torch.rand(T, k, generator=generator).softmax(-1)
        return Routing.from_indices(indices, gates, num_experts=E)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value - expected‖ / ‖expected‖, in float64."""
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def check(name: str, value: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The relative error; raises if it is too large for the result to be worth timing."""
    error = relative_error(value, expected)
    if not error <= TOLERANCE[dtype]:
        raise ArithmeticError(f"{name} is off by {error:.1e} of the norm; allowed is {TOLERANCE[dtype]:.0e}")
    return error
