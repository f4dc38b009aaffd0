"""What launchers put on a stream: how many kernels, grids that a device takes, and every kernel there is."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

import cuda_binary
from emulator import (
    build,
    test_decode,
    test_expand,
    test_gram,
    test_mixture,
    test_routed,
    test_router,
    test_routing,
    test_shrink,
    test_skinny,
)
from emulator.arrays import BF16, F16, F32, F64, normal, unwritten
from emulator.test_routing import FLAGS
from emulator.test_shrink import DTYPES, accumulator, route, sort

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture
def plain(rng) -> Iterator[ModuleType]:
    """The module, nothing noted; what runs is the same in all ways."""
    module = build.load("plain")
    module.seed(0)
    module.take_launches()
    yield module
    module.dry(False)


@pytest.fixture
def dry(plain: ModuleType) -> ModuleType:
    """Launches are checked as a device would, and nothing runs."""
    plain.dry(True)
    return plain


def count(module: ModuleType) -> int:
    return len(module.take_launches())


def names(module: ModuleType) -> list[str]:
    """The kernels, without what they are made for."""
    return [re.match(r"\(?(\w+)", name)[1] for name, _ in module.take_launches()]


def zeros(*shape: int, dtype: np.dtype) -> np.ndarray:
    """Of any size, in a few bytes: nothing that runs dry looks at them."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def launches_of_few_tokens(
    module: ModuleType, tokens: int, k: int, experts: int, rank: int, sizes: tuple[int, int], dtype: np.dtype
) -> dict[str, int]:
    """The mixture with its own router and with a routing given, without and with gradients to come."""
    (width, out), acc, slots = sizes, accumulator(dtype), tokens * k
    x, y = np.zeros((tokens, width), dtype), np.zeros((tokens, out), dtype)
    A, B = zeros(experts, rank, width, dtype=dtype), zeros(experts, out, rank, dtype=dtype)
    router, weights = zeros(experts, width, dtype=acc), np.zeros((tokens, k), acc)
    offsets, order = np.zeros(experts + 1, np.int32), np.zeros(slots, np.int32)
    logits, ids, h = (
        np.zeros((tokens, experts), acc),
        np.zeros((tokens, k), np.int64),
        np.zeros((slots, rank), acc),
    )
    given = (x, A, B, offsets, order, weights, None, 1.0, None, y, None, y.copy())
    counts = {}
    module.decode(x, A, B, router, k, 0, True, None, None, 1.0, None, y)
    counts["routed"] = count(module)
    module.routed(x, A, B, router, k, 0, True, 1.0, None, y, logits, weights, ids, offsets, order, h)
    counts["routed, for a backward"] = count(module)
    module.mixture(*given, None)
    counts["given"] = count(module)
    module.mixture(*given, h)
    counts["given, for a backward"] = count(module)
    return counts


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 16, 33, 64])
@pytest.mark.parametrize(
    ("k", "experts", "rank"),
    [
        *((1, 1, 1), (2, 8, 16), (8, 64, 16), (2, 128, 8), (2, 512, 256), (64, 512, 8), (8, 513, 16)),
        *((65, 65, 3), (100, 128, 256), (8, 1000, 256), (1, 4096, 1), (8, 4096, 16), (2, 4096, 256)),
        (4096, 4096, 5),
    ],
)
def test_few_tokens_are_two_launches(
    dry: ModuleType, dtype: np.dtype, tokens: int, k: int, experts: int, rank: int
) -> None:
    for sizes in [(1, 1), (64, 48), (4096, 4096), (2049, 33)]:
        small = (min(sizes[0], 64), min(sizes[1], 48)) if tokens * k * rank > 100_000 else sizes
        counts = launches_of_few_tokens(dry, tokens, k, experts, rank, small, dtype)
        assert set(counts.values()) == {2}, (sizes, counts)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_few_tokens_are_two_launches_with_the_base(dry: ModuleType, dtype: np.dtype, tokens: int) -> None:
    """Up to 16 tokens in 16-bit types, with the layer's own router or a routing given."""
    for experts, rank, width, out in [(8, 16, 4096, 4096), (1, 1, 8, 1), (12, 8, 4096, 11008)]:
        k = min(2, experts)
        x, y, weight = (np.zeros(size, dtype) for size in [(tokens, width), (tokens, out), (out, width)])
        A, B = zeros(experts, rank, width, dtype=dtype), zeros(experts, out, rank, dtype=dtype)
        flags = (k, 0, True, 1.0, None, None, None)
        dry.decode_linear(x, weight, None, A, B, zeros(experts, width, dtype=F32), *flags, y)
        assert count(dry) == 2
        offsets, order = np.zeros(experts + 1, np.int32), np.zeros(tokens * k, np.int32)
        gates = (offsets, order, np.zeros((tokens, k), F32))
        dry.mixture_linear(x, weight, None, A, B, *gates, None, 1.0, None, y)
        assert count(dry) == 2


def test_many_tokens_of_few_experts_leave_the_sort_out(dry: ModuleType) -> None:
    """Without gradients: every expert's products at once, of which expand takes what the ids say."""
    tokens, width, out, experts, rank = 8192, 4096, 4096, 8, 16
    x, y = zeros(tokens, width, dtype=BF16), np.zeros((tokens, out), BF16)
    A, B = zeros(experts, rank, width, dtype=BF16), zeros(experts, out, rank, dtype=BF16)
    there = np.zeros((tokens, experts), F32), np.zeros((tokens, 2), F32), np.zeros((tokens, 2), np.int64)
    router = zeros(experts, width, dtype=F32)
    assert dry.routed_expand(x, A, B, router, 2, 0, False, 1.0, None, *there, y)
    assert names(dry) == ["dense_mma", "dense_sum", "topk_kernel", "expand_fragments", "expand_dense"]
    gates = np.zeros(experts + 1, np.int32), np.zeros(2 * tokens, np.int32), there[1]
    dry.mixture(x, A, B, *gates, None, 1.0, None, None, None, y, None)
    assert names(dry) == ["dense_mma", "expand_places", "expand_fragments", "expand_dense"]


def test_all_of_A_is_read_while_tokens_choose_most_of_it(dry: ModuleType) -> None:
    """Only experts that no token can choose make that a loss."""
    assert dry.decode_plan(64, 2, 128, 64, 4096, 2)  # 67 MB, and all of it may be chosen
    assert dry.decode_plan(1, 2, 130, 16, 4096, 2)
    assert not dry.decode_plan(1, 2, 131, 16, 4096, 2)  # 129 idle experts of 131 kB
    assert not dry.decode_plan(65, 2, 8, 16, 64, 2)
    assert not dry.decode_plan(1, 2, 513, 1, 8, 2)
    # x is read again for each tile of columns: wide tiles where both are large
    assert dry.dense_plan(64, 2048, 128, 4096, 2)[0] != "few"
    assert dry.dense_plan(16, 2048, 128, 4096, 2)[0] == "few"
    assert dry.dense_plan(64, 128, 8, 4096, 2)[0] == "few"


def test_routing_is_one_launch_and_three_at_most(dry: ModuleType, rng) -> None:
    for tokens, k, experts, launches in [
        (1, 2, 8, 1),
        (64, 8, 512, 1),
        (2048, 2, 8, 1),
        (16384, 8, 128, 2),
        (8192, 2, 4096, 3),
    ]:
        logits = np.zeros((tokens, experts), F32)
        out = unwritten(tokens, k), np.zeros((tokens, k), np.int64)
        sorting = np.zeros(experts + 1, np.int32), np.zeros(tokens * k, np.int32)
        dry.topk(logits, k, 0, True, None, None, *out, *sorting)
        assert count(dry) == launches


TOKENS = 4_200_000  # 65535 tiles of 64 and more


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("tokens", "experts"), [(TOKENS, 3), (300, 8192)])
def test_a_device_takes_every_grid(dry: ModuleType, rng, dtype: np.dtype, tokens: int, experts: int) -> None:
    """The y and z of a grid end at 65535: neither millions of tokens nor many experts may be there."""
    k, rank, width = 2, 4, 2
    ids = np.stack([np.arange(tokens) % experts, (np.arange(tokens) + 1) % experts], 1)
    offsets, order = sort(ids, experts)
    x, weights = np.zeros((tokens, width), dtype), np.zeros((tokens, k), F32)
    A, B = np.zeros((experts, rank, width), dtype), np.zeros((experts, width, rank), dtype)
    values, dz, slots = (
        np.zeros((tokens * k, rank), F32),
        np.zeros(tokens * k, F32),
        np.zeros(tokens * k, F32),
    )
    router, logits = np.zeros((experts, width), F32), np.zeros((tokens, experts), F32)
    given = (offsets, order, weights, None, 1.0, None)
    dry.topk(logits, k, 0, False, None, None, weights, ids, offsets, order)
    dry.topk_backward(weights, logits, ids, 0, False, None, logits)
    dry.topk_backward(weights, logits, ids, 1, False, order, slots)
    dry.sort_by_expert(ids.ravel(), experts, offsets, order)
    dry.router(x, router, logits)
    dry.router_backward(x, router, logits, x, router)
    dry.shrink(x, A, offsets, order, None, values)
    dry.backward_shrink(x, B, offsets, order, None, 1.0, None, values, values, slots)
    dry.expand(values, B, *given, None, None, x)
    dry.backward_expand(values, A, *given, dz, router, x)
    dry.mixture(x, A, B, *given, None, None, x, None)
    dry.gram(x, x, values, values, *given, dz, A, B, router)
    assert count(dry) >= 12


# ---- every kernel that is compiled for a device has run here ----


def run_everything(module: ModuleType, rng: np.random.Generator) -> None:
    """Each kernel at least once, against float64."""
    for dtype in DTYPES.values():
        for rank in (8, 40, 80):
            test_shrink.check(module, rng, route(rng, 70, 2, 3), rank, 640, dtype, experts=3)
        test_router.check(
            module, normal(rng, 70, 600, dtype=dtype), normal(rng, 17, 600, dtype=accumulator(dtype))
        )
        test_expand.check(module, rng, route(rng, 9, 2, 3), 4, 40, dtype, experts=3)
        test_expand.check(module, rng, route(rng, 9, 2, 2), 400, 8, dtype, experts=2)
        test_gram.check(module, rng, route(rng, 1100, 1, 2), 4, 9, dtype, experts=2)
        test_gram.test_router(module, rng, dtype, 9, 3, 33, 0, 1.0)
        test_decode.check(module, rng, 3, 2, 8, 16, 64, 40, dtype)
        test_routed.check(module, rng, 3, 2, 8, 16, (64, 40), dtype)
        test_mixture.check(module, rng, route(rng, 9, 2, 8), 8, 16, (600, 40), dtype)
    for dtype in (BF16, F16):
        test_shrink.check(module, rng, route(rng, 2048, 2, 3), 4, 16, dtype, experts=3)
        test_decode.check(module, rng, 3, 2, 8, 16, 64, 40, dtype, adapter=F32)
        test_expand.check(module, rng, route(rng, 1030, 2, 3), 16, 8, dtype, experts=3)
        test_expand.check(module, rng, route(rng, 2100, 1, 20), 16, 8, dtype, experts=20)
        test_gram.check(module, rng, route(rng, 40, 2, 3), 40, 24, dtype, experts=3)
        test_decode.check(module, rng, 64, 2, 64, 16, 64, 24, dtype)
        test_skinny.check(module, rng, 5, 2, 8, 16, 64, 40, dtype)
        test_skinny.check_base(module, rng, 5, 64, 40, dtype)
    for experts in (8, 32, 128, 512, 513):
        test_routing.check_topk(module, normal(rng, 9, experts), 2)
    test_routing.check_topk(module, normal(rng, 9, 8, dtype=F64), 2)
    test_routing.check_topk(module, normal(rng, 600, 64), 8)
    test_routing.test_backward(module, rng, F32, *FLAGS[0])
    test_routing.test_backward(module, rng, F32, *FLAGS[1])
    test_routing.test_backward(module, rng, F64, *FLAGS[1])
    test_routing.test_sort(module, rng, 20011, 64)


def test_every_kernel_of_the_budget_runs(plain: ModuleType, rng) -> None:
    run_everything(plain, rng)
    told = subprocess.run(["nm", plain.__file__], capture_output=True, text=True, check=True)
    symbols = {
        int(at, 16): name
        for at, _, name in (line.split() for line in told.stdout.splitlines() if line[0] != " ")
    }
    mangled = {symbols[at] for _, at in plain.take_launches()}
    ran = set(cuda_binary.short_names(mangled).values())
    assert set(cuda_binary.read_budget(cuda_binary.BUDGET.read_text())) <= ran
