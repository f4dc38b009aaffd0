"""Shrink kernels against float64: ``h[p] = A_e x[t]`` and ``u[p] = dy[t] B_e`` with ``dw = s·⟨h, u⟩``."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from emulator.arrays import (
    BF16,
    F16,
    F32,
    F64,
    TOLERANCE,
    assert_close,
    assert_no_conflicts,
    exact,
    normal,
    rounded,
    unwritten,
)

DTYPES = {"f32": F32, "f64": F64, "bf16": BF16, "f16": F16}
TYPE = {F32: 0, F64: 1, BF16: 2, F16: 3}  # csrc/common/types.h


def not_on_the_cpu(emulator: ModuleType) -> None:
    """The CPU's operators read routings before a kernel does, and raise; on a device that would be a wait."""
    device = None if isinstance(emulator, ModuleType) else emulator.device
    if device is not None and device.type == "cpu":
        pytest.skip("the CPU raises: tests/test_bad_operators.py")


def accumulator(dtype: np.dtype) -> np.dtype:
    return F64 if dtype == F64 else F32


def route(rng: np.random.Generator, tokens: int, k: int, experts: int, none: float = 0.0) -> np.ndarray:
    """Ids ``[tokens, k]``, distinct in a row, some of them -1."""
    ids = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :k]
    return np.where(rng.random(ids.shape) < none, -1, ids)


def sort(ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    flat = np.where(ids.ravel() < 0, experts, ids.ravel())
    order = np.argsort(flat, kind="stable")
    return np.searchsorted(flat[order], np.arange(experts + 1)).astype(np.int32), order.astype(np.int32)


def expected(rows: np.ndarray, panels: np.ndarray, ids: np.ndarray, ranks: np.ndarray | None) -> np.ndarray:
    """Row times its expert's panel ``[experts, rank, width]``, in sorted order."""
    rows, panels = exact(rows), exact(panels)
    experts, rank, _ = panels.shape
    offsets, order = sort(ids, experts)
    result = np.zeros((ids.size, rank))
    for e in range(experts):
        used = rank if ranks is None else ranks[e]
        at = slice(offsets[e], offsets[e + 1])
        result[at, :used] = rows[order[at] // ids.shape[1]] @ panels[e, :used].T
    return result


def check(
    emulator: ModuleType,
    rng: np.random.Generator,
    ids: np.ndarray,
    rank: int,
    width: int,
    dtype: np.dtype,
    *,
    experts: int,
    adapter: np.dtype | None = None,
    ranks: np.ndarray | None = None,
    pad: int = 0,
    shift: int = 0,
    backward: bool = True,
) -> None:
    """Forward and backward; rows are ``width + pad`` apart and start ``shift`` elements into their memory."""
    tokens, k = ids.shape
    acc, adapter = accumulator(dtype), dtype if adapter is None else adapter
    offsets, order = sort(ids, experts)
    what = f"T={tokens} k={k} E={experts} r={rank} width={width} {dtype} {adapter}"
    # float32 adapters are rounded as they are read.
    panels = rounded(exact(rounded(rng.standard_normal((experts, rank, width)), dtype)), adapter)
    if ranks is not None:
        for e in range(experts):
            panels[e, ranks[e] :] = rounded(np.array(np.nan), adapter)
    wide = normal(rng, tokens, shift + width + pad, dtype=dtype)
    rows = wide[:, shift : shift + width]

    want = expected(rows, panels, ids, ranks)
    h = unwritten(ids.size, rank, dtype=acc)
    emulator.shrink(rows, panels, offsets, order, ranks, h)
    assert_close(h, want, f"h at {what}")
    assert (h[offsets[-1] :] == 0).all()
    again = unwritten(ids.size, rank, dtype=acc)
    emulator.shrink(rows, panels, offsets, order, ranks, again)
    assert h.tobytes() == again.tobytes()
    if not backward:
        return

    scale = rng.standard_normal(experts)
    other = normal(rng, ids.size, rank, dtype=acc)
    u, dw = unwritten(ids.size, rank, dtype=acc), unwritten(ids.size, dtype=acc)
    emulator.backward_shrink(
        rows, np.ascontiguousarray(panels.transpose(0, 2, 1)), offsets, order, scale, 0.5, ranks, other, u, dw
    )
    if isinstance(emulator, ModuleType):  # no operator returns u, and dw is made of it
        assert_close(u, want, f"u at {what}")
    sorted_ids = ids.ravel()[order]
    signed = np.zeros((ids.size, rank))
    signed[order] = np.where(sorted_ids >= 0, 0.5 * scale[sorted_ids], 0)[:, None] * want * exact(other)
    # A single dot may cancel: measured against the sum of its terms' sizes.
    off, size = dw - signed.sum(1), np.abs(signed).sum(1)
    assert np.linalg.norm(off) <= TOLERANCE[acc] * np.linalg.norm(size), f"dw at {what}"
    assert (dw[ids.ravel() < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 16, 24, 64, 128, 256])
def test_ranks(emulator: ModuleType, rng, dtype: np.dtype, rank: int) -> None:
    check(emulator, rng, route(rng, 40, 2, 3, 0.1), rank, 136, dtype, experts=3)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 33, 64, 129, 257, 640])
def test_widths(emulator: ModuleType, rng, dtype: np.dtype, width: int) -> None:
    check(emulator, rng, route(rng, 37, 2, 3), 16, width, dtype, experts=3)
    check(emulator, rng, route(rng, 5, 1, 2), 5, width, dtype, experts=2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("experts", [1, 3, 7, 64, 65, 513])
@pytest.mark.parametrize("tokens", [0, 1, 7, 130])
def test_experts_and_tokens(emulator: ModuleType, rng, dtype: np.dtype, experts: int, tokens: int) -> None:
    for k in sorted({1, min(2, experts), min(experts, 8)}) if experts < 100 else [2]:
        check(emulator, rng, route(rng, tokens, k, experts, 0.2), 4, 40, dtype, experts=experts)


@pytest.mark.plain_alone
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_4096_experts(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, route(rng, 40, 3, 4096, 0.1), 3, 9, dtype, experts=4096)
    check(emulator, rng, route(rng, 4200, 1, 4096), 3, 9, dtype, experts=4096)  # tiles by expert


def test_no_columns(emulator: ModuleType, rng) -> None:
    for dtype in (F32, BF16):
        check(emulator, rng, route(rng, 9, 2, 3), 8, 0, dtype, experts=3)


def test_every_expert_selected(emulator: ModuleType, rng) -> None:
    check(emulator, rng, route(rng, 9, 65, 65), 8, 40, BF16, experts=65)
    check(emulator, rng, route(rng, 70, 7, 7), 8, 40, F32, experts=7)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_uneven_segments(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, np.full((200, 1), 3), 16, 64, dtype, experts=8)  # all to one
    check(emulator, rng, np.full((70, 2), -1), 16, 64, dtype, experts=4)  # none at all
    check(emulator, rng, np.full((3, 1), -1), 16, 64, dtype, experts=40)
    for rows in (63, 64, 65, 127, 128, 129):
        ids = np.repeat(np.array([5, 1, 5, 0]), [rows, 64, 1, 2])[:, None]
        check(emulator, rng, ids, 8, 64, dtype, experts=7, backward=False)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mixed_ranks_leave_rows_unread(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    ids = route(rng, 50, 2, 5, 0.1)
    for rank, ranks in [(16, [16, 3, 0, 8, 1]), (40, [33, 40, 8, 0, 17])]:
        check(emulator, rng, ids, rank, 130, dtype, experts=5, ranks=np.array(ranks, np.int32))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_apart_and_misaligned(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    for pad, shift in [(8, 0), (3, 0), (8, 8), (7, 1)]:
        check(emulator, rng, route(rng, 20, 2, 3), 8, 96, dtype, experts=3, pad=pad, shift=shift)
    row = normal(rng, 1, 96, dtype=dtype)
    same = np.broadcast_to(row, (20, 96))  # stride 0
    ids = route(rng, 20, 2, 3)
    offsets, order = sort(ids, 3)
    panels, h = normal(rng, 3, 8, 96, dtype=dtype), unwritten(40, 8, dtype=accumulator(dtype))
    emulator.shrink(same, panels, offsets, order, None, h)
    assert_close(h, expected(same, panels, ids, None))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_float32_adapters_under_half(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    for rank, width in [(16, 128), (5, 77), (64, 64)]:
        ids = route(rng, 33, 2, 4, 0.1)
        check(emulator, rng, ids, rank, width, dtype, experts=4, adapter=F32)


def test_every_path_of_the_plan(emulator: ModuleType, rng) -> None:
    """One tile per slot or many per expert, splits, several column tiles, and the second launch."""
    seen = set()
    for dtype, tokens, k, experts, rank, width in [
        (BF16, 4, 2, 64, 16, 64),
        (BF16, 300, 2, 4, 16, 64),
        (BF16, 70, 2, 4, 16, 1100),
        (BF16, 70, 2, 4, 200, 576),
        (BF16, 70, 2, 4, 200, 64),
        (F32, 70, 2, 4, 100, 64),
        (F32, 3, 2, 64, 16, 1100),
        (F64, 70, 2, 4, 20, 640),
    ]:
        check(emulator, rng, route(rng, tokens, k, experts, 0.1), rank, width, dtype, experts=experts)
        plan = emulator.shrink_plan(tokens * k, experts, rank, width, TYPE[dtype], True)
        _, columns, column_tiles, splits, by_slot, finish = plan
        seen |= {("columns", columns), ("tiles", column_tiles > 1), ("splits", splits > 1)}
        seen |= {("by slot", by_slot), ("finish", finish)}
    paths = {("columns", 16), ("columns", 64), ("columns", 128)}
    paths |= {(name, flag) for name in ("tiles", "splits", "by slot", "finish") for flag in (False, True)}
    assert seen == paths


def test_dense_pass(emulator: ModuleType, rng) -> None:
    """Many tokens, few rows of A: every expert's product of every token, of which the selected are taken."""
    for tokens, k, experts, rank, width, dtype, adapter, pad in [
        (2048, 2, 3, 4, 40, BF16, BF16, 0),
        (2049, 2, 5, 7, 33, BF16, BF16, 1),
        (2048, 3, 4, 40, 72, BF16, F32, 0),
        (2048, 2, 15, 16, 64, F16, F16, 8),
        (2050, 2, 2, 8, 520, F16, F16, 0),
    ]:
        filled = -(-rank // 8) * 8  # backward
        assert emulator.dense_shrink_plan(tokens, k, experts, filled, True)
        ids = route(rng, tokens, k, experts, 0.1)
        ranks = rng.integers(0, rank + 1, experts).astype(np.int32)
        options = {"experts": experts, "adapter": adapter, "pad": pad}
        check(emulator, rng, ids, rank, width, dtype, ranks=ranks, **options)
    assert_no_conflicts(emulator)
    assert not emulator.dense_shrink_plan(2048, 2, 64, 16, True)  # 1024 rows: grouped
    assert not emulator.dense_shrink_plan(2048, 1, 8, 16, True)  # x is read once anyhow


@pytest.mark.parametrize(("tokens", "width"), [(9, 40), (130, 257), (2050, 72)])
@pytest.mark.parametrize("adapter", [BF16, F32], ids=["bf16", "f32"])
def test_a_layers_own_router_reads_x_with_the_shrink(
    emulator: ModuleType, rng, tokens: int, width: int, adapter: np.dtype
) -> None:
    """One pass: logits to float32's accuracy, and every expert's product, of which ``pick`` takes h."""
    k, experts, rank = 2, 6, 5
    x, router = normal(rng, tokens, width, dtype=BF16), normal(rng, experts, width)
    panels = rounded(exact(rounded(rng.standard_normal((experts, rank, width)), BF16)), adapter)
    ids = route(rng, tokens, k, experts, 0.1)
    logits, h = unwritten(tokens, experts), unwritten(tokens * k, rank)
    fits = emulator.routed_shrink(x, panels, router, k, *sort(ids, experts), logits, h)
    assert fits == (tokens >= 2048)
    assert_close(logits, exact(x) @ exact(router).T, "logits")
    assert_close(h, expected(x, panels, ids, None), "h", 1e-2)


def test_no_bank_conflicts(emulator: ModuleType, rng) -> None:
    for dtype, rank in [(BF16, 16), (BF16, 64), (BF16, 128), (F16, 16)]:
        check(emulator, rng, route(rng, 130, 2, 3), rank, 256, dtype, experts=3)
    check(emulator, rng, route(rng, 130, 2, 3), 16, 128, F32, experts=3, backward=False)
    check(emulator, rng, route(rng, 130, 2, 3), 64, 128, F32, experts=3, backward=False)
    assert_no_conflicts(emulator)


def test_wild_routing_stays_inside(emulator: ModuleType, rng) -> None:
    """What offsets, order and ranks hold is clamped before it becomes an address."""
    not_on_the_cpu(emulator)
    x, panels = normal(rng, 20, 64, dtype=BF16), normal(rng, 3, 8, 64, dtype=BF16)
    columns = np.ascontiguousarray(panels.transpose(0, 2, 1))
    wild = rng.integers(-(2**31), 2**31, 40).astype(np.int32)
    ranks = np.array([-5, 2**30, 8], np.int32)
    for offsets in ([0, 10, 20, 40], [-9, 12, 90, 2**30], [5, 5, 5, 5], [2**31 - 1] * 4):
        offsets, other = np.array(offsets, np.int32), normal(rng, 40, 8)
        emulator.shrink(x, panels, offsets, wild, ranks, unwritten(40, 8))
        # dw is written where order says, so there only the other two are wild.
        for order, dw in [(wild, None), (rng.permutation(40).astype(np.int32), unwritten(40))]:
            emulator.backward_shrink(
                x, columns, offsets, order, None, 1.0, ranks, other, unwritten(40, 8), dw
            )
