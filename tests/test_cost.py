"""What the mixture may cost: memory kept for the backward, temporaries, the number of operators called."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moa_ops
from helpers import make_mixture
from moa_ops import MoALinear, Routing


def saved_bytes(layer: nn.Module, x: Tensor, **given: Routing) -> int:
    """Bytes that the graph of ``layer(x)`` keeps, beside x and the parameters, which are alive anyway."""
    alive = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, **given)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_saved_for_the_backward(dtype: torch.dtype) -> None:
    """At T = 2048 and E = 8 the issue allows 3 MB; routing, logits and h are 0.4 MB."""
    layer = MoALinear(2048, 2048, num_experts=8, r=16, dtype=dtype)
    x = torch.randn(2048, 2048, dtype=dtype, requires_grad=True)
    routing_and_h = 2048 * (8 * 4 + 2 * (4 + 8 + 4 + 16 * 4))
    assert 0 < saved_bytes(layer, x) <= routing_and_h + 1024
    _, routing = layer.route(x.detach())
    assert 0 < saved_bytes(layer, x, routing=routing) <= routing_and_h + 1024
    assert routing_and_h < 3e6


class CountCalls(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def calls_of(experts: int, grad: bool, level: str) -> list[str]:
    layer = MoALinear(32, 24, num_experts=experts, routing_level=level)
    x = torch.randn(2, 40, 32, requires_grad=grad)
    with torch.set_grad_enabled(grad), CountCalls() as counter:
        y = layer(x)
        if grad:
            y.backward(torch.ones_like(y))
    return counter.calls


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("grad", [False, True])
def test_no_loop_over_experts(grad: bool, level: str) -> None:
    """The same few operators whatever the number of experts."""
    few, many = calls_of(2, grad, level), calls_of(200, grad, level)
    assert few == many
    assert len(many) < (30 if level == "token" else 45)


def test_inference_is_one_operator() -> None:
    layer = MoALinear(32, 24)
    x = torch.randn(40, 32)
    with torch.no_grad(), CountCalls() as counter:
        layer(x)
    assert counter.calls == ["moa_ops.routed_linear.default"]
    with CountCalls() as counter:
        layer.requires_grad_(False)(x)  # nothing needs a gradient: no autograd either
    assert counter.calls == ["moa_ops.routed_linear.default"]
    _, routing = layer.route(x)
    rows = x.view(4, 10, 32)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), CountCalls() as counter:
            layer(x, routing=routing)
            moa_ops.segment_lora(rows, layer.lora_A, layer.lora_B, routing)
        assert counter.calls == ["moa_ops.segment_linear.default"] * 2


def calls_in_python(function: Callable[[], object]) -> list[str]:
    """Names of the functions of moa_ops that ``function`` enters, and of whatever these call."""
    package = str(Path(moa_ops.__file__).parent)
    found: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename.startswith(package):
            found.append(arg.__name__)
        elif event == "call":
            frames = [frame, *([frame.f_back] if frame.f_back else [])]
            if any(f.f_code.co_filename.startswith(package) for f in frames):
                found.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


def test_a_call_without_gradients_is_few_calls_in_python() -> None:
    """What Python adds to a decode step, without a clock: the number does not depend on the machine."""
    layer, x = MoALinear(32, 24), torch.randn(1, 32)
    _, routing = layer.route(x)
    with torch.no_grad():
        assert len(calls := calls_in_python(lambda: layer(x))) <= 6, calls
        assert len(calls := calls_in_python(lambda: layer(x, routing=routing))) <= 12, calls
    assert {"forward", "moa_linear"} <= set(calls)


def test_a_training_step_is_an_operator_forward_and_one_backward() -> None:
    """Router, mixture and base together: they can read x once, and the base's product can be our own."""
    layer = MoALinear(32, 24)
    with CountCalls() as counter:
        y = layer(torch.randn(40, 32, requires_grad=True))
        forward = list(counter.calls)
        y.backward(torch.ones_like(y))
    operators = [
        [name for name in names if "moa_ops" in name or "mm" in name] for names in (forward, counter.calls)
    ]
    assert operators[0] == ["moa_ops.routed_lora.default"]
    assert operators[1] == [*operators[0], "moa_ops.segment_lora_backward.default"]


def test_a_function_is_entered_only_for_gradients() -> None:
    p = make_mixture()
    assert moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, p.routing()).grad_fn is None
    p.x.requires_grad_()
    with torch.no_grad():
        assert moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, p.routing()).grad_fn is None
    y = moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, p.routing())
    assert y.grad_fn is not None
    assert not moa_ops.topk_routing(torch.randn(3, 4, requires_grad=True), 2).order.requires_grad


def test_frozen_parts_are_not_computed() -> None:
    """With adapters alone to train, the backward makes neither dx nor the router's gradient."""
    layer = MoALinear(32, 24)
    layer.router.requires_grad_(False)
    y = layer(torch.randn(10, 32))
    with CountCalls() as counter:
        y.backward(torch.ones_like(y))
    assert not [name for name in counter.calls if "mm" in name]
    assert "moa_ops.segment_lora_backward.default" in counter.calls


PEAK = """
import resource, torch
import moa_ops
torch.manual_seed(0)
tokens, top_k, features, experts, r = 16384, 8, 512, 16, 8
x = torch.randn(tokens, features)
A, B = torch.randn(experts, r, features), torch.randn(experts, features, r)
logits = torch.randn(tokens, experts)
x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), logits.requires_grad_()
grad = torch.randn(tokens, features)
small = moa_ops.topk_routing(logits[:64], top_k)
moa_ops.segment_lora(x[:64], A, B, small).backward(grad[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = moa_ops.segment_lora(x, A, B, moa_ops.topk_routing(logits, top_k))
y.backward(grad)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_temporary_of_tokens_times_k_times_features() -> None:
    """Peak memory of a process: x, y and dx are 32 MB each; one [T·k, in] alone would be 256 MB."""
    root = str(Path(moa_ops.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", PEAK], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 200


FAULTS = """
import resource, torch, moa_ops
torch.set_num_threads(1)
x = torch.randn(1, 512, requires_grad=True)
layer = moa_ops.MoALinear(512, 512, num_experts=64, r=128)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer(x).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
layer.lora_A.grad = layer.lora_B.grad = None
print(faults())
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system has no huge pages"
)
def test_large_results_take_huge_pages() -> None:
    """dA and dB are 16 MB each, new at every step: 8,192 pages of 4 KB, or sixteen of 2 MB."""
    root = str(Path(moa_ops.__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    run = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 6000
