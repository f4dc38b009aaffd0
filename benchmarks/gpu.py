"""What a mixture costs on a GPU: layers and kernels beside the floor, plain PyTorch's forms and PEFT.

``python -m benchmarks.gpu`` prints the table; ``make gpu-check`` files it. Times are medians of CUDA events
over rotated inputs with the L2 cache flushed. Floors are arithmetic: the extra bytes of the mixture at the
copy bandwidth measured in the same run, over the measured base.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moa_ops
from benchmarks import gpu_timer
from benchmarks.alternatives import ALTERNATIVES, YARDSTICKS, Alternative, GatherBmm, PlainLora
from benchmarks.beside import step
from benchmarks.gpu_record import GIVEN
from benchmarks.inputs import DTYPES, Problem, Shape, check
from benchmarks.record import BASE, OURS, Case

ROTATED = 4  # inputs


@dataclass(frozen=True)
class Point:
    """A layer to time: its shape, what is timed, and the most it may cost over the base on an H200 (bf16)."""

    shape: Shape
    section: str  # "forward", "training", "decode" (forward, as CUDA graphs), GIVEN (the same)
    aim: float


POINTS = (
    Point(Shape(8192, 4096, 4096, 8), "forward", 1.12),
    Point(Shape(8192, 4096, 4096, 64), "forward", 1.25),
    Point(Shape(8192, 4096, 4096, 8), "training", 1.20),
    Point(Shape(16, 4096, 4096, 8), "decode", 1.35),
    Point(Shape(1, 4096, 4096, 8), "decode", 1.35),
    Point(Shape(16, 4096, 4096, 64), GIVEN, 1.35),
)
ROUTINGS = ((16384, 128, 8, 12e-6), (8192, 8, 2, None), (64, 64, 8, None))  # T, E, k, aim in seconds
TINY = tuple(
    Point(Shape(24, 64, 48, 4), section, aim)
    for section, aim in (("forward", 1.12), ("training", 1.2), (GIVEN, 1.35))
)


def inputs_of(problem: Problem, train: bool) -> list[Tensor]:
    shape, generator = problem.x.shape, torch.Generator(problem.x.device).manual_seed(2)
    more = [
        torch.randn(shape, generator=generator, device=problem.x.device).to(problem.dtype)
        for _ in range(ROTATED - 1)
    ]
    return [x.requires_grad_(train) for x in (problem.x.clone(), *more)]


def peft_layer(problem: Problem) -> torch.nn.Module | str:
    """One plain LoRA by PEFT over the same weight, or why there is none."""
    try:
        import peft
    except ImportError:
        return "peft is not installed"
    model = torch.nn.Sequential(torch.nn.Linear(*problem.weight.shape[::-1], bias=False, device="meta"))
    model[0].weight = torch.nn.Parameter(problem.weight, requires_grad=False)
    config = peft.LoraConfig(r=problem.shape.r, target_modules=["0"], lora_alpha=32)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(problem.x)


def trained(function: torch.nn.Module | Alternative) -> list[Tensor]:
    """The adapters and the router; the base is frozen. A step returns their gradients: added to those of the
    step before, x's would cost every form 60 us more that no model has.
    """
    parameters = list(function.parameters())
    return parameters if isinstance(function, Alternative) else [p for p in parameters if p.requires_grad]


class FlashInfer(Alternative):
    """Tokens gathered in expert order, and two segment products of flashinfer's. It has no gradients."""

    name = "flashinfer"

    def __init__(self, problem: Problem, train: bool = False) -> None:
        from flashinfer import SegmentGEMMWrapper

        super().__init__(problem, train)
        workspace = torch.empty(128 << 20, dtype=torch.int8, device=problem.x.device)
        self.product = SegmentGEMMWrapper(workspace)

    @staticmethod
    def why_not(problem: Problem, train: bool) -> str | None:
        if train:
            return "has no gradients"
        if problem.dtype.itemsize != 2:
            return "takes bfloat16 and float16 only"
        return None if importlib.util.find_spec("flashinfer") else "flashinfer is not installed"

    def __call__(self, x: Tensor) -> Tensor:
        gates, tokens, counts = self.sorted_gates(x)
        segments = {"seg_indptr": F.pad(counts.cumsum(0), (1, 0))}
        experts = self.shape.experts
        h = self.product.run(x[tokens], self.lora_A, experts, True, **segments) * gates
        y = self.product.run(h, self.lora_B, experts, False, **segments)
        return F.linear(x, self.weight).index_add_(0, tokens, y)


def variants(
    problem: Problem, train: bool, expected: Tensor
) -> tuple[dict[str, torch.nn.Module | Alternative], dict[str, dict]]:
    """Functions of x by name, results checked, and what is known of each before timing."""
    functions: dict[str, torch.nn.Module | Alternative] = {BASE: problem.linear, OURS: problem.layer}
    known = {OURS: {"error": check(OURS, problem.layer(problem.x), expected, problem.dtype)}}
    for kind in (*ALTERNATIVES, FlashInfer):
        if absent := kind.why_not(problem, train=train):
            known[kind.name] = {"absent": absent}
            continue
        known[kind.name] = {}
        try:
            alternative = kind(problem, train)
            y = alternative(problem.x)
            if kind.same_result:
                known[kind.name]["error"] = check(kind.name, y, expected, problem.dtype)
        except (RuntimeError, ImportError, ArithmeticError) as error:  # not there on this card, or wrong
            known[kind.name] = {"absent": str(error).splitlines()[0][:120]}
            continue
        functions[kind.name] = alternative
    peft = peft_layer(problem)
    if isinstance(peft, str):
        known["one PEFT LoRA"] = {"absent": peft}
    else:
        functions["one PEFT LoRA"], known["one PEFT LoRA"] = peft, {}
    return functions, known


def given_variants(problem: Problem, expected: Tensor) -> tuple[dict[str, Any], dict[str, dict]]:
    """The same where nobody routes, as in a model that decides once for many layers: every token's experts
    and gates are there.
    """
    _, routing = problem.layer.route(problem.x)
    gather, plain = GatherBmm(problem), PlainLora(problem)
    gates = gather.gates(problem.x)
    gather.gates = lambda _: gates
    ours = lambda x: problem.layer(x, routing=routing)  # noqa: E731
    functions = {BASE: problem.linear, OURS: ours, gather.name: gather, plain.name: plain}
    results = {OURS: ours, gather.name: gather}
    known = {
        name: {"error": check(name, f(problem.x), expected, problem.dtype)} for name, f in results.items()
    }
    return functions, known


def layer_case(point: Point, dtype: str, device: torch.device, budget: float, copy_rate: float) -> Case:
    """One row: the layer and everything beside it."""
    train, decode = point.section == "training", point.section in ("decode", GIVEN)
    problem = Problem(point.shape, DTYPES[dtype], device=device)
    with torch.set_grad_enabled(train):
        if point.section == GIVEN:
            functions, known = given_variants(problem, problem.expected())
        else:
            functions, known = variants(problem, train, problem.expected())
    xs, grad_y = inputs_of(problem, train), problem.grad_y
    case = Case(
        point.section, point.shape.label, dtype, BASE, "cold", yardsticks=[*YARDSTICKS, "one PEFT LoRA"]
    )
    case.variants = known

    def timed(name: str, function: torch.nn.Module | Alternative) -> gpu_timer.Function | None:
        if train:
            parameters = trained(function)
            return lambda number: step(function, xs[number % ROTATED], parameters, grad_y)
        if not decode:
            return lambda number: function(xs[number % ROTATED])
        try:
            return gpu_timer.graphed(function, xs)
        except RuntimeError as error:  # a form that waits for the device cannot be captured
            known[name] = {"absent": f"no CUDA graph: {str(error).splitlines()[0][:90]}"}
            return None

    with torch.set_grad_enabled(train):
        ready = {name: call for name, f in functions.items() if (call := timed(name, f)) is not None}
        timings = gpu_timer.measure(ready, BASE, device, budget=budget)
    for name, timing in timings.items():
        case.variants.setdefault(name, {}).update(timing.to_dict())
    seconds = extra_bytes(point.shape, problem.x.element_size(), train) / copy_rate
    with torch.set_grad_enabled(train):
        found = gpu_timer.kernels(ready[OURS], device)
    floor = 1 + seconds / timings[BASE].seconds.median
    case.facts = {"floor": floor, "aim": point.aim, "kernels": found}
    return case


def extra_bytes(shape: Shape, size: int, train: bool) -> int:
    """What a mixture moves beyond the base: x once, y twice, the adapters; about three times in training."""
    forward = shape.tokens * (shape.in_features + 2 * shape.out_features) * size
    adapters = min(shape.experts, shape.tokens * shape.top_k) * shape.r
    forward += adapters * (shape.in_features + shape.out_features) * size
    return 3 * forward if train else forward


def plain_routing(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    """What people write: softmax, top-k, a stable sort, a histogram."""
    weights, indices = logits.float().softmax(-1).topk(k)
    order = indices.view(-1).argsort(stable=True)
    counts = torch.bincount(indices.view(-1), minlength=logits.shape[1])
    return weights, indices, counts.cumsum(0), order


def routing_case(
    tokens: int, experts: int, k: int, aim: float | None, device: torch.device, budget: float
) -> Case:
    """Routing alone: microseconds, and its ratio to plain PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(tokens, experts, generator=generator).to(device) for _ in range(ROTATED)]
    ours = torch.ops.moa_ops.topk_routing
    functions: dict[str, gpu_timer.Function] = {
        "plain PyTorch": lambda number: plain_routing(logits[number % ROTATED], k),
        OURS: lambda number: ours(logits[number % ROTATED], k, 0, False, None, None),
    }
    case = Case("routing", f"T={tokens} E={experts} k={k}", "float32", "plain PyTorch", "cold")
    for name, timing in gpu_timer.measure(functions, "plain PyTorch", device, budget=budget).items():
        case.variants[name] = timing.to_dict()
    case.facts = {"aim_seconds": aim, "kernels": gpu_timer.kernels(functions[OURS], device)}
    return case


def mixture_case(shape: Shape, dtype: str, device: torch.device, budget: float, copy_rate: float) -> Case:
    """The mixture alone (shrink and expand) as a share of the copy bandwidth; the aim is 75 %."""
    problem = Problem(shape, DTYPES[dtype], device=device)
    routing = problem.routing().to(device)
    xs = inputs_of(problem, False)
    base = torch.randn(shape.tokens, shape.out_features).to(problem.x)
    copied = torch.empty_like(base)
    functions: dict[str, gpu_timer.Function] = {
        "copy of y": lambda number: copied.copy_(base),
        OURS: lambda number: moa_ops.segment_lora(
            xs[number % ROTATED], problem.lora_A, problem.lora_B, routing, base=base
        ),
    }
    case = Case("mixture", shape.label, dtype, "copy of y", "cold")
    with torch.no_grad():
        timings = gpu_timer.measure(functions, "copy of y", device, budget=budget)
        found = gpu_timer.kernels(functions[OURS], device)
    for name, timing in timings.items():
        case.variants[name] = timing.to_dict()
    moved = extra_bytes(shape, problem.x.element_size(), False)
    share = moved / copy_rate / timings[OURS].seconds.median
    case.facts = {"share_of_copy": share, "aim_share": 0.75, "kernels": found}
    return case


def copy_rate(device: torch.device, budget: float) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.zeros(256 << 20 if device.type == "cuda" else 4 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = gpu_timer.measure({"copy": lambda _: target.copy_(source)}, "copy", device, budget=budget)
    return 2 * source.nbytes / timing["copy"].seconds.median


def run(
    device: torch.device, budget: float, tiny: bool = False
) -> Iterator[tuple[dict[str, Any], list[Case]]]:
    """Facts, and the cases so far, after every case: about ``budget`` seconds of timing each.

    tiny: small shapes that a CPU can do.
    """
    rate = copy_rate(device, budget / 4)
    facts = {"copy_gbytes_per_s": 1e-9 * rate, "seconds_per_case": budget}
    dtype = "float32" if tiny else "bfloat16"
    points, routings = (TINY, ((64, 8, 2, None),)) if tiny else (POINTS, ROUTINGS)
    cases = []
    for point in points:
        cases.append(layer_case(point, dtype, device, budget, rate))
        yield facts, cases
    for routing in routings:
        cases.append(routing_case(*routing, device, budget))
        yield facts, cases
    cases.append(mixture_case(points[0].shape, dtype, device, budget, rate))
    yield facts, cases


def main(words: list[str] | None = None) -> None:
    """Prints the table; ``--json FILE`` also writes what was measured."""
    from benchmarks import gpu_record

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: %(default)s; cpu only tries the code")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing per case (%(default)s)")
    parser.add_argument("--json", help="a file for what was measured")
    args = parser.parse_args(words)
    device = torch.device(args.device)
    for facts, cases in run(device, args.budget, tiny=device.type != "cuda"):
        print(gpu_record.table(cases[-1:]), flush=True)
        if args.json:  # what is there when the time runs out is kept
            Path(args.json).write_text(json.dumps({"facts": facts, "cases": [vars(case) for case in cases]}))


if __name__ == "__main__":
    main()
