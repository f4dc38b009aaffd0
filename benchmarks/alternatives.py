"""What people write in plain PyTorch for the same layer, each in the fastest form found; and one plain LoRA.

All get B as ``[E, r, out]``, the layout that suits them, made outside the timing, and route in float32 by a
softmax over the chosen k logits, which equals what ``MoALinear`` computes. They update the base's output in
place. The same code runs with and without gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Problem

GATHER_LIMIT = 16 << 20  # values of gathered A and B beyond which nobody would gather them
MEMORY_LIMIT = 3 << 30  # bytes that a form may make of temporaries
COMPILED = "best, compiled"


class Alternative:
    """A function of x with its own parameters: lora_A, lora_B and router."""

    name = ""
    same_result = True  # whether it computes the mixture at all

    def __init__(self, problem: Problem, train: bool = False) -> None:
        self.shape, self.weight, self.scaling = problem.shape, problem.weight, problem.scaling
        self.lora_A, self.lora_B, self.router = (
            t.detach().requires_grad_(train) for t in (problem.lora_A, problem.lora_Bt, problem.router_weight)
        )

    @staticmethod
    def why_not(problem: Problem, train: bool) -> str | None:
        """Why it is not run at this point, if it is not."""
        return None

    def parameters(self) -> list[Tensor]:
        return [self.lora_A, self.lora_B, self.router]

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate weights times scaling, in x's dtype, and expert ids; both ``[T, k]``."""
        top, indices = F.linear(x.float(), self.router).topk(self.shape.top_k)
        return (torch.softmax(top, -1) * self.scaling).to(x.dtype), indices

    def sorted_gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates ``[T·k, 1]`` and token numbers ``[T·k]`` sorted by expert, and how many each expert has."""
        gates, indices = self.gates(x)
        flat = indices.view(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.shape.experts)
        return gates.view(-1)[order, None], order // self.shape.top_k, counts

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class PlainLora(Alternative):
    """One adapter for every token: a yardstick. It does a k-th of the work and routes nothing."""

    name = "one plain LoRA"
    same_result = False

    def __init__(self, problem: Problem, train: bool = False) -> None:
        super().__init__(problem, train)
        self.lora_A = problem.lora_A[0].clone().requires_grad_(train)
        self.lora_B = problem.lora_B[0].t().contiguous().requires_grad_(train)

    def parameters(self) -> list[Tensor]:
        return [self.lora_A, self.lora_B]

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y.addmm_(F.linear(x, self.lora_A), self.lora_B, alpha=self.scaling)


class Loop(Alternative):
    """A Python loop over the experts that have tokens."""

    name = "loop"

    def __call__(self, x: Tensor) -> Tensor:
        gates, tokens, counts = self.sorted_gates(x)
        sizes = counts.tolist()
        y = F.linear(x, self.weight)
        for e, (rows, gate) in enumerate(zip(tokens.split(sizes), gates.split(sizes), strict=True)):
            if rows.numel():
                h = F.linear(x[rows], self.lora_A[e]) * gate
                y.index_add_(0, rows, h @ self.lora_B[e])
        return y


class DenseMasked(Alternative):
    """All experts for all tokens as one LoRA of rank E·r, with what was not chosen multiplied by zero."""

    name = "dense-masked"

    @staticmethod
    def why_not(problem: Problem, train: bool) -> str | None:
        shape = problem.shape
        hidden = shape.tokens * shape.experts * shape.r * problem.x.element_size()
        needed = hidden * (5 if train else 2)
        return f"needs {needed / 2**30:.1f} GB for h" if needed > MEMORY_LIMIT else None

    def __call__(self, x: Tensor) -> Tensor:
        gates, indices = self.gates(x)
        E, r = self.shape.experts, self.shape.r
        mask = x.new_zeros(x.shape[0], E).scatter(1, indices, gates)
        h = F.linear(x, self.lora_A.view(E * r, -1)).view(-1, E, r) * mask[..., None]
        return F.linear(x, self.weight).addmm_(h.view(-1, E * r), self.lora_B.view(E * r, -1))


class GroupedMM(Alternative):
    """Tokens gathered in expert order, and two ``torch.nn.functional.grouped_mm``."""

    name = "grouped_mm"

    @staticmethod
    def why_not(problem: Problem, train: bool) -> str | None:
        if not hasattr(F, "grouped_mm"):
            return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
        row = 16 // problem.x.element_size()
        shape = problem.shape
        if any(size % row for size in (shape.r, shape.in_features, shape.out_features)):
            return f"takes multiples of {row} only"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        gates, tokens, counts = self.sorted_gates(x)
        ends = counts.cumsum(0, dtype=torch.int32)
        h = F.grouped_mm(x[tokens], self.lora_A.transpose(1, 2), offs=ends) * gates
        return F.linear(x, self.weight).index_add_(0, tokens, F.grouped_mm(h, self.lora_B, offs=ends))


class GatherBmm(Alternative):
    """Each token's own A and B gathered, and two batched products: for few tokens."""

    name = "gather+bmm"

    @staticmethod
    def why_not(problem: Problem, train: bool) -> str | None:
        shape = problem.shape
        values = shape.tokens * shape.top_k * shape.r * (shape.in_features + shape.out_features)
        return "gathers too much" if values > GATHER_LIMIT else None

    def __call__(self, x: Tensor) -> Tensor:
        gates, indices = self.gates(x)
        rank = self.shape.top_k * self.shape.r
        h = torch.bmm(self.lora_A[indices].view(len(x), rank, -1), x[..., None])
        h = (h.view(*indices.shape, -1) * gates[..., None]).view(len(x), 1, rank)
        y = F.linear(x, self.weight)
        return y.add_(torch.bmm(h, self.lora_B[indices].view(len(x), rank, -1)).squeeze(1))


ALTERNATIVES: tuple[type[Alternative], ...] = (PlainLora, Loop, DenseMasked, GroupedMM, GatherBmm)
COMPILABLE = (DenseMasked, GatherBmm)
"""Not the loop, unrolled anew for every batch; nor grouped_mm: in float32 it fails, in bfloat16 it breaks the
graph and took longer than uncompiled (6 of 6: T=4, 64, 512, forward and step)."""
YARDSTICKS = tuple(kind.name for kind in ALTERNATIVES if not kind.same_result)
