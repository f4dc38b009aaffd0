"""What only a card can show: graphs, streams, devices, no waiting, more than 2^31 elements, errors."""

from __future__ import annotations

import pytest
import torch

import moa_ops
from helpers import assert_close, moa


def layer_of(device, dtype: torch.dtype = torch.bfloat16, experts: int = 8, **options) -> moa_ops.MoALinear:
    layer = moa_ops.MoALinear(256, 192, num_experts=experts, r=16, device=device, dtype=dtype, **options)
    torch.nn.init.normal_(layer.lora_B)
    return layer


# 600 experts: up to 64 tokens are blocks that wait for each other, whose counters every replay has to clear.
@pytest.mark.parametrize("experts", [8, 600])
@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 5000])
def test_graph_replay_with_changed_routing(cuda, tokens: int, experts: int) -> None:
    layer = layer_of(cuda, experts=experts)
    x = torch.randn(tokens, 256, device=cuda, dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in range(4):
            torch.manual_seed(seed)
            x.copy_(torch.randn_like(x) * (seed + 1))  # other tokens, other experts
            if seed == 3:
                x.copy_(x[:1].expand_as(x))  # all of them the same two: the other segments are empty
            graph.replay()
            assert torch.equal(y, layer(x))


def test_graph_replay_with_another_routing_given(cuda) -> None:
    layer, x = layer_of(cuda), torch.randn(16, 256, device=cuda, dtype=torch.bfloat16)
    ids = torch.rand(4, 16, 8, device=cuda).argsort(-1)[..., :2]
    routing, *others = (moa_ops.Routing.from_indices(i, num_experts=8) for i in ids)
    with torch.no_grad():
        layer(x, routing=routing)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, routing=routing)
        for other in others:
            for name in ("weights", "indices", "expert_offsets", "order"):
                getattr(routing, name).copy_(getattr(other, name))
            graph.replay()
            assert torch.equal(y, layer(x, routing=other))


@pytest.mark.parametrize("tokens", [40, 200])
def test_training_step_in_a_graph(cuda, tokens: int) -> None:
    layer = layer_of(cuda, norm_topk_prob=False)
    x = torch.randn(tokens, 256, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    parameters = [x, layer.lora_A, layer.lora_B, layer.router.weight]

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x).float().square().sum(), parameters)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, expected in zip(grads, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("tokens", "experts"), [(3000, 8), (64, 600)])
def test_two_streams_at_once(cuda, tokens: int, experts: int) -> None:
    """Also where blocks wait for each other: neither stream's may keep the other's waiting for ever."""
    layer = layer_of(cuda, experts=experts)
    xs = [torch.randn(tokens, 256, device=cuda, dtype=torch.bfloat16) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in xs]
    with torch.no_grad():
        expected = [layer(x) for x in xs]
        torch.cuda.synchronize()
        for _ in range(20):
            found = []
            for x, stream in zip(xs, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(layer(x))
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_device(cuda) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    layer, x = layer_of(cuda), torch.randn(50, 256, device=cuda, dtype=torch.bfloat16)
    expected = layer(x)
    assert torch.cuda.current_device() == 0
    assert torch.equal(layer.to("cuda:1")(x.to("cuda:1")).cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0


def test_nothing_waits_for_the_device(cuda) -> None:
    layer = layer_of(cuda)
    x = torch.randn(500, 256, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs_memory(gbytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gbytes * 1e9:
        pytest.skip(f"needs {gbytes} GB of free memory")


def test_more_than_2_31_logits(cuda) -> None:
    needs_memory(16)
    logits = torch.randn(530_000, 4096, device=cuda, dtype=torch.bfloat16)
    assert logits.numel() > 1 << 31
    _, indices, _, order = moa.topk_routing(logits, 2, 0, True, None, None)
    last = moa.topk_routing(logits[-1000:].contiguous(), 2, 0, True, None, None)[1]
    assert torch.equal(indices[-1000:], last)
    assert torch.equal(order.long().sort().values, torch.arange(order.numel(), device=cuda))


def test_more_than_2_31_inputs_and_outputs(cuda) -> None:
    needs_memory(24)
    tokens = 140_000
    x = torch.randn(tokens, 16384, device=cuda, dtype=torch.bfloat16)
    lora_A = torch.randn(4, 8, 16384, device=cuda, dtype=torch.bfloat16) / 128
    lora_B = torch.randn(4, 16384, 8, device=cuda, dtype=torch.bfloat16)
    assert x.numel() > 1 << 31
    routing = moa_ops.Routing.from_indices(torch.arange(tokens, device=cuda) % 4, num_experts=4)
    y = moa_ops.segment_lora(x, lora_A, lora_B, routing)
    rows = torch.arange(tokens - 64, tokens, device=cuda)
    part = moa_ops.Routing.from_indices(rows % 4, num_experts=4)
    assert_close(y[-64:], moa_ops.segment_lora(x[-64:].contiguous(), lora_A, lora_B, part).double())


def test_tensors_on_two_devices_are_refused_in_words(cuda) -> None:
    with pytest.raises((ValueError, RuntimeError), match="the CPU"):
        moa.topk_routing(torch.randn(3, 4, device=cuda), 2, 0, False, torch.zeros(4), None)


def test_wild_ids_are_no_addresses(cuda) -> None:
    ids = torch.tensor([3, -9, 2**40, 1], device=cuda)
    offsets, order = moa.sort_by_expert(ids, 4)
    assert offsets.tolist() == [0, 0, 1, 1, 2]
    assert order.tolist() == [3, 0, 1, 2]
