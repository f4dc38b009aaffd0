"""Problems to compute, and the comparison with float64 that every numerical test uses."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moa_ops import MoALinear, Routing, reference

moa = torch.ops.moa_ops

# Error ÷ norm, against float64 on the same (already rounded) inputs.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}
DTYPES = list(TOLERANCE)


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ ÷ ‖expected‖, the norm itself where the expected is all zero; NaN is infinite."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm().item()
    result = (actual - expected).norm().item() / (norm if norm > 0 else 1.0)
    return result if result == result else float("inf")


def assert_close(actual: Tensor, expected: Tensor, what: str = "", dtype: torch.dtype | None = None) -> None:
    """The error is within the tolerance of the actual tensor's dtype, or of ``dtype``."""
    limit = TOLERANCE[dtype or actual.dtype]
    assert error(actual, expected) < limit, (
        f"{what}: error {error(actual, expected):.2e}, allowed {limit:.0e}"
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit on a CPU. On a card within rounding: there the library picks the order of a product's sum
    by its shape, by layouts, and by whether something is added to it.
    """
    if actual.is_cuda:
        assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected)


def make_indices(tokens: int, top_k: int, experts: int, kind: str = "random") -> Tensor:
    """Expert ids ``[T, k]``: "random"; "one" gets every token; "holes": empty experts, -1 slots; "none"."""
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
    if kind == "one":
        ids = torch.where(ids == 0, ids[:, :1], ids)
        ids[:, 0] = 0
    elif kind == "holes":
        ids = torch.where((ids % 3 == 1) | (torch.rand(ids.shape) < 0.2), -1, ids)
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    return ids.contiguous()


@dataclass
class Mixture:
    """Arguments of the operator segment_lora, with a random gradient of its output."""

    x: Tensor
    lora_A: Tensor
    lora_B: Tensor
    weights: Tensor
    expert_offsets: Tensor
    order: Tensor
    expert_scaling: Tensor | None
    scaling: float
    ranks: Tensor | None
    base: Tensor | None
    bias: Tensor | None
    indices: Tensor
    grad_y: Tensor

    def forward(self, implementation: Any = moa) -> tuple[Tensor, Tensor]:
        """y, h."""
        return implementation.segment_lora(*[getattr(self, name) for name in FORWARD])

    def backward(
        self, h: Tensor, implementation: Any = moa, need: tuple[bool, ...] = (True,) * 4
    ) -> tuple[Tensor, ...]:
        """Gradients of x, A, B and weights."""
        lora = [getattr(self, name) for name in FORWARD[:9]]
        lora.insert(4, self.indices)
        router = (None, None, 0, False)
        return implementation.segment_lora_backward(
            self.grad_y, *lora[:7], h, *lora[7:], *router, *need, False
        )[:4]

    def routing(self) -> Routing:
        return Routing(self.weights, self.indices, self.expert_offsets, self.order, self.lora_A.shape[0])

    def double(self) -> Mixture:
        """The same in float64."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        floating = {
            name: value.double()
            for name, value in values.items()
            if isinstance(value, Tensor) and value.dtype.is_floating_point
        }
        return replace(self, **floating)


FORWARD = [field.name for field in fields(Mixture)][:11]


def make_mixture(
    tokens: int = 37,
    in_features: int = 96,
    out_features: int = 80,
    experts: int = 5,
    top_k: int = 2,
    r: int = 8,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    kind: str = "random",
    ranks: bool = False,
    expert_scaling: bool = False,
    base: bool = True,
    bias: bool = False,
) -> Mixture:
    """Random normal tensors throughout, rounded to the dtype under test."""
    acc = reference.accumulation_dtype(dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    indices = make_indices(tokens, top_k, experts, kind)
    expert_offsets, order = reference.sort_by_expert(indices, experts)
    return Mixture(
        x=normal(tokens, in_features),
        lora_A=normal(experts, r, in_features, dtype=adapter_dtype or dtype),
        lora_B=normal(experts, out_features, r, dtype=adapter_dtype or dtype),
        weights=normal(tokens, top_k, dtype=acc),
        expert_offsets=expert_offsets,
        order=order,
        expert_scaling=normal(experts, dtype=acc) if expert_scaling else None,
        scaling=0.7,
        ranks=torch.randint(0, r + 1, (experts,)) if ranks else None,
        base=normal(tokens, out_features) if base else None,
        bias=normal(out_features) if bias else None,
        indices=indices,
        grad_y=normal(tokens, out_features),
    )


def check_mixture(problem: Mixture) -> None:
    """Forward and backward of the kernels against the reference in float64."""
    exact = problem.double()
    y, h = problem.forward()
    exact_y, exact_h = exact.forward(reference)
    dtype = problem.x.dtype
    assert y.dtype == dtype
    assert h.dtype == reference.accumulation_dtype(dtype)
    # Under 16-bit x a card's tensor cores take float32 adapters rounded to x's type.
    as_x = dtype if problem.x.is_cuda and problem.lora_A.dtype != dtype else None
    assert_close(y, exact_y, "y")
    assert_close(h, exact_h, "h", as_x)
    names = ("x", "lora_A", "lora_B", "weights")
    grads = problem.backward(h)
    for name, grad, expected in zip(names, grads, exact.backward(exact_h, reference), strict=True):
        assert grad.dtype == getattr(problem, name).dtype
        assert_close(grad, expected, f"gradient of {name}", as_x)


def strided(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other layouts: (name, tensor)."""
    transposed = tensor.new_empty(tensor.shape[::-1]).permute(*range(tensor.dim())[::-1])
    yield "transposed", transposed.copy_(tensor)
    spaced = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2]
    yield "every second column", spaced.copy_(tensor)
    wide = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 3)[..., 1:-2]
    yield "padded rows", wide.copy_(tensor)
    misaligned = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    yield "misaligned", misaligned.copy_(tensor)


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every subset of ``names`` but the empty one."""
    return [subset for size in range(1, len(names) + 1) for subset in itertools.combinations(names, size)]


def gradients(function: Callable[[], Tensor], inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Gradients of ``function()`` for the inputs that require one."""
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(function(), list(wanted.values()), grad), strict=True))


def make_layer(*sizes: int, dtype: torch.dtype = torch.float32, **options: object) -> MoALinear:
    """A layer whose adapters do something: lora_B starts at zero, so it is drawn anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # top-1 renormalised: see test_top_1_renormalised_warns
        layer = MoALinear(*(sizes or (48, 40)), dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def expected_output(layer: MoALinear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer's equation in float64, routed per token."""
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    return reference.moa_linear(
        x.double(),
        p["weight"],
        p.get("bias"),
        p["lora_A"],
        p["lora_B"],
        p["router.weight"],
        layer.top_k,
        score_func=layer.score_func,
        norm_topk_prob=layer.norm_topk_prob,
        scaling=layer.scaling,
        mask=mask,
    )


def raises(message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """``function`` raises, and says ``message``: what was given and what is allowed."""
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        function(*args, **kwargs)
