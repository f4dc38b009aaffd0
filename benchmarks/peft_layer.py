"""How does a layer of ours compare with PEFT's? The same adapters, the same weights, the same result.

Four ways to use several LoRAs in PEFT, each at one linear layer, each beside ours set to compute the same:

- one adapter for every token; ours by id;
- a mixed batch (``adapter_names``): one adapter per row; ours by id;
- Arrow: top-k of |x · prototype|, a softmax over the chosen; ours with the same prototypes as its router;
- X-LoRA with top-k and a softmax over the chosen: the scalings are given, so that the second pass through the
  whole model that X-LoRA takes to find them is not counted; ours finds its weights from the same logits.

All results, of a training step the gradient of x too, are compared with ours before anything is timed. The
two ways that route are measured in float32 only: in bfloat16 PEFT decides with rounded scores, so that some
tokens go elsewhere. PEFT's mixed batch refuses to train.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moa_ops
from benchmarks.inputs import DTYPES, LORA_ALPHA, Problem, Shape, check, floor
from benchmarks.options import Functions, Options, Trial
from benchmarks.record import BASE, OURS, PEFT, Case
from moa_ops import Routing

SHAPE = Shape(512, 2048, 2048, 8)
ROWS = 8
NAMES = [f"expert_{e}" for e in range(SHAPE.experts)]

Layer = Callable[[Tensor], Tensor]


def trials(options: Options) -> Iterator[Trial]:
    """Forward, and training steps in float32."""
    for dtype in options.dtypes[:1] if options.quick else options.dtypes:
        for way, make in WAYS.items():
            if dtype == "float32" or make not in ROUTED:
                yield _trial(way, make, dtype, train=False)
    if "float32" in options.dtypes and not options.quick:
        for way in ("one adapter", "Arrow", "X-LoRA"):
            yield _trial(way, WAYS[way], "float32", train=True)


def peft_linear(problem: Problem, train: bool) -> tuple[Any, Any]:
    """PEFT's model and its layer over the same weight, with all adapters, the first one active."""
    import peft

    config = peft.LoraConfig(r=SHAPE.r, lora_alpha=LORA_ALPHA, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(problem.linear), config, NAMES[0], autocast_adapter_dtype=False)
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    layer.to(problem.dtype)
    for e, name in enumerate(NAMES):
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(problem.lora_A[e])
            layer.lora_B[name].weight.copy_(problem.lora_B[e])
    for parameter in layer.parameters():
        parameter.requires_grad_(train and parameter is not layer.base_layer.weight)
    return model.train(train), layer


def one_adapter(problem: Problem, train: bool) -> tuple[Layer, Layer, nn.Module]:
    """Every token with the first adapter."""
    _, layer = peft_linear(problem, train)
    routing = Routing.from_indices(torch.zeros(SHAPE.tokens, dtype=torch.int64), num_experts=SHAPE.experts)
    return lambda x: problem.layer(x, routing=routing), layer, layer


def mixed_batch(problem: Problem, train: bool) -> tuple[Layer, Layer, nn.Module]:
    """A row of tokens each with an adapter of its own."""
    _, layer = peft_linear(problem, train)
    rows = torch.arange(ROWS).remainder(SHAPE.experts)
    routing = Routing.from_indices(rows.repeat_interleave(SHAPE.tokens // ROWS), num_experts=SHAPE.experts)
    names = [NAMES[row] for row in rows]
    return lambda x: problem.layer(x, routing=routing), lambda x: layer(x, adapter_names=names), layer


def arrow(problem: Problem, train: bool) -> tuple[Layer, Layer, nn.Module]:
    """Routing by prototypes, which PEFT reads off the adapters."""
    import peft

    model, layer = peft_linear(problem, train)
    config = peft.ArrowConfig(top_k=SHAPE.top_k, router_temperature=1.0, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = list(NAMES), []
    router = peft.LoraConfig(r=SHAPE.r, target_modules=["0"], arrow_config=config)
    model.add_adapter("arrow_router", router)
    model.set_adapter("arrow_router")
    for name in NAMES:  # set_adapter froze them
        for matrix in (layer.lora_A, layer.lora_B):
            matrix[name].weight.requires_grad_(train)
    layer(problem.x.view(ROWS, -1, SHAPE.in_features))
    prototypes = layer.lora_arrow["arrow_router"].prototypes

    def ours(x: Tensor) -> Tensor:
        logits = F.linear(x, prototypes).abs()
        return problem.layer(x, routing=moa_ops.topk_routing(logits, SHAPE.top_k, norm_topk_prob=True))

    return ours, layer, layer


def x_lora(problem: Problem, train: bool) -> tuple[Layer, Layer, nn.Module]:
    """A scaling per token and adapter, all but the top k of them zero; every adapter computes every token."""
    import peft
    from peft.tuners.xlora.layer import XLoraLinearLayer

    _, layer = peft_linear(problem, train)
    layer.set_adapter(NAMES)
    config = peft.XLoraConfig(
        hidden_size=SHAPE.in_features,
        adapters=dict.fromkeys(NAMES, ""),
        top_k_lora=SHAPE.top_k,
        enable_softmax=False,
        enable_softmax_topk=True,
        global_scaling_weight=1.0,
    )
    wrapped = XLoraLinearLayer(SimpleNamespace(disabled=False), layer, layer.forward, 0, config)
    layer.router = nn.Parameter(problem.router_weight, requires_grad=train)

    def theirs(x: Tensor) -> Tensor:
        return wrapped.forward(x, scalings=F.linear(x, layer.router)[:, :, None])

    return problem.layer, theirs, layer


WAYS: dict[str, Callable[[Problem, bool], tuple[Layer, Layer, nn.Module]]] = {
    "one adapter": one_adapter,
    "mixed batch": mixed_batch,
    "Arrow": arrow,
    "X-LoRA": x_lora,
}
ROUTED = (arrow, x_lora)  # the others go by id, one adapter per token


def _trial(
    way: str, make: Callable[[Problem, bool], tuple[Layer, Layer, nn.Module]], dtype: str, train: bool
) -> Trial:
    case = Case("peft", f"{way}{', training step' if train else ''}, {SHAPE.label}", dtype, BASE)
    extra = SHAPE.extra if make in ROUTED else replace(SHAPE, top_k=1).extra_by_id
    case.facts = {"train": train, "floor": floor(extra, train)}

    def prepare() -> Functions:
        if importlib.util.find_spec("peft") is None:
            case.variants[PEFT] = {"absent": "peft is not installed"}
            return {}
        problem = Problem(SHAPE, DTYPES[dtype])
        ours, theirs, layer = make(problem, train)
        x = problem.x.view(ROWS, -1, SHAPE.in_features).clone().requires_grad_(train)
        with torch.no_grad():
            case.variants[OURS] = {"error": check(PEFT, theirs(x), ours(x).double(), problem.dtype)}
        if not train:
            return {BASE: lambda: problem.linear(x), OURS: lambda: ours(x), PEFT: lambda: theirs(x)}
        return _steps(problem, x, ours, theirs, [p for p in layer.parameters() if p.requires_grad])

    return Trial(case, prepare, (BASE, OURS, PEFT), share=0.5, grad=train)


def _steps(problem: Problem, x: Tensor, ours: Layer, theirs: Layer, parameters: list[Tensor]) -> Functions:
    """A step of each: gradients of x, of the adapters and, where it has one, of the router."""
    grad_y = problem.grad_y.view(*x.shape[:-1], -1)
    mine = [problem.layer.lora_A, problem.layer.lora_B, problem.layer.router.weight]

    def run(function: Layer, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x), [x, *wanted], grad_y, allow_unused=True)

    check(PEFT, run(theirs, parameters)[0], run(ours, mine)[0].double(), problem.dtype)
    return {
        BASE: lambda: run(problem.linear, []),
        OURS: lambda: run(ours, mine),
        PEFT: lambda: run(theirs, parameters),
    }
