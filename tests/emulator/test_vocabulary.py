"""Every word of csrc/common/device.cuh: both sides have it, nvcc compiles it, and it does what CUDA says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from emulator import build
from emulator.arrays import BF16, F16, F32, F64, assert_close, exact, normal, rounded, unwritten

HERE = Path(__file__).resolve().parent
LANES = np.arange(32)


def from_lane(v: np.ndarray, lane: np.ndarray) -> np.ndarray:
    """Lane l gets the value of lane ``lane[l]``, its own where that lies outside its group (marked by -1)."""
    return v[np.where(lane < 0, LANES, lane)]


def bits_of(flags: np.ndarray) -> int:
    return int(sum(1 << int(lane) for lane in np.flatnonzero(flags)))


def groups(v: np.ndarray, width: int, reduce) -> np.ndarray:
    return np.repeat(reduce(v.reshape(-1, width), axis=1), width)


def expected_lanes(v: np.ndarray) -> list[np.ndarray | int]:
    unsigned = v.view(np.uint32)
    float_bits = [groups(v, w, np.sum).astype(np.float32).view(np.uint32) for w in (32, 8)]
    first_half = LANES < 16
    return [
        v[(LANES + 3) % 32],
        v[LANES // 8 * 8 + 5],
        from_lane(v, np.where(LANES >= 2, LANES - 2, -1)),
        from_lane(v, np.where(LANES % 16 >= 3, LANES - 3, -1)),
        from_lane(v, np.where(LANES < 27, LANES + 5, -1)),
        from_lane(v, np.where(LANES % 4 < 3, LANES + 1, -1)),
        v[LANES ^ 9],
        from_lane(
            v, np.where((LANES ^ 8) < LANES, LANES ^ 8, -1)
        ),  # an earlier group is in reach, a later one not
        bits_of(v & 1),
        int((v == 3).any()),
        int((v >= -8).all()),
        np.array([bits_of(v == mine) for mine in v]),
        np.array([bits_of((v & 1) == (mine & 1)) for mine in v]),
        v.sum(),
        v.min(),
        v.max(),
        unsigned.min(),
        unsigned.max(),
        np.bitwise_and.reduce(unsigned | 0x100),
        np.bitwise_or.reduce(unsigned & 0xFF),
        np.where(first_half, v[LANES ^ 1], bits_of(~first_half & (v & 2 != 0))),
        *float_bits,
        v.max(),
        groups(v, 4, np.max),
        v.min(),
        groups(v, 16, np.min),
    ]


def test_lanes(emulator: ModuleType, rng: np.random.Generator) -> None:
    v = rng.integers(-8, 8, 32).astype(np.int32)
    expected = [np.broadcast_to(row, 32).astype(np.int64) & 0xFFFFFFFF for row in expected_lanes(v)]
    out = unwritten(len(expected), 32, dtype=np.uint32)
    emulator.lanes(v, out)
    for row, (actual, wanted) in enumerate(zip(out, expected, strict=True)):
        assert np.array_equal(actual, wanted), f"row {row}: {actual} instead of {wanted}"


def test_bits(emulator: ModuleType, rng: np.random.Generator) -> None:
    v = rng.integers(0, 1 << 32, 32, dtype=np.uint32)
    v[:3] = 0, 1, 0x80000000
    w = np.roll(v, -1)

    def rows(a: int, b: int, lane: int) -> list[int]:
        both, flipped = a << 32 | b, b << 32 | a
        text = f"{a:032b}"
        byte = [flipped >> 8 * i & 0xFF for i in range(8)]
        signed = [x - (1 << 32) if x >> 31 else x for x in (a, b)]
        fma = np.float32(np.float64(np.float32(a)) * 0.5 + np.float64(np.float32(b)))
        return [
            a.bit_count(),
            both.bit_count(),
            (a & -a).bit_length(),
            (both & -both).bit_length(),
            32 - a.bit_length(),
            64 - both.bit_length(),
            int(text[::-1], 2),
            byte[0] | byte[1] << 8 | byte[4] << 16 | byte[5] << 24,
            byte[6] | byte[7] << 8 | byte[2] << 16 | byte[3] << 24,
            flipped << lane >> 32 & 0xFFFFFFFF,
            flipped >> lane & 0xFFFFFFFF,
            a * b >> 32,
            min(signed) & 0xFFFFFFFF,
            max(a, b),
            int(fma.view(np.uint32)),
        ]

    expected = np.array([rows(int(a), int(b), lane) for lane, (a, b) in enumerate(zip(v, w, strict=True))]).T
    out = unwritten(*expected.shape, dtype=np.uint32)
    emulator.bits(v, out)
    for row, (actual, wanted) in enumerate(zip(out, expected, strict=True)):
        assert np.array_equal(actual, wanted), f"row {row}: {actual} instead of {wanted}"


def test_ldmatrix(emulator: ModuleType) -> None:
    tile = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = unwritten(12, 32, dtype=np.uint32)
    emulator.ldmatrix(tile, out)
    pairs = [m.reshape(32, 2) for t in (tile, tile.swapaxes(1, 2)) for m in t]  # lane l: elements 2l, 2l + 1
    expected = np.array([pair[:, 0] | pair[:, 1].astype(np.uint32) << 16 for pair in pairs])
    assert np.array_equal(out[:8], expected)
    assert np.array_equal(out[8:], expected[[0, 1, 4, 5]])


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "f16", "tf32"])
def test_mma(emulator: ModuleType, rng: np.random.Generator, dtype: np.dtype) -> None:
    k = 8 if dtype == F32 else 16
    a, b, c = normal(rng, 16, k, dtype=dtype), normal(rng, k, 8, dtype=dtype), normal(rng, 16, 8)
    if dtype == F32:  # nearest, ties away from zero
        cut = [((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32) for x in (a, b)]
    else:
        cut = [a, b]
    expected = c + exact(cut[0]) @ exact(cut[1])
    emulator.mma(a, b, c)
    assert_close(c, expected)


@np.errstate(all="ignore")
@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=["bf16", "f16", "f64"])
def test_convert(emulator: ModuleType, rng: np.random.Generator, dtype: np.dtype) -> None:
    every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (np.nextafter(every_half, np.float32(np.inf)) + every_half) / 2
    ties = every_half + np.float32(2.0**-25)
    scale = np.float32(2.0) ** rng.integers(-30, 20, 4096).astype(np.float32)
    special = np.array([65519.996, 65520, 65536, 1e38, 3.4e38, 1e-40, -0.0, 0], np.float32)
    x = np.concatenate([every_half, between, ties, normal(rng, 4096) * scale, special])
    wanted = rounded(x, dtype)
    out, back = unwritten(x.size, dtype=dtype), unwritten(x.size)
    half = dtype != F64
    pairs, pairs_back = unwritten(x.size // 2, dtype=np.uint32), unwritten(x.size)
    emulator.convert(x, out, back, pairs if half else None, pairs_back if half else None)
    assert np.array_equal(exact(out), exact(wanted), equal_nan=True)
    assert np.array_equal(np.signbit(exact(out)[~np.isnan(x)]), np.signbit(x[~np.isnan(x)]))
    assert np.array_equal(back, exact(wanted).astype(np.float32), equal_nan=True)
    if half:
        assert np.array_equal(pairs.view(np.uint16), out.view(np.uint16))
        assert np.array_equal(pairs_back, back, equal_nan=True)


def test_atomics(emulator: ModuleType) -> None:
    v = np.array([1, 100, 77, 5, 0xFFFFFFFF, 0, 0, 0], np.uint32)
    wide, votes = np.zeros(3, np.uint64), unwritten(3, 64, dtype=np.int32)
    emulator.atomics(v, wide, votes)
    assert v.tolist() == [1 + 63 * 32, 36, 0, 63, 0xFFFFFFC0, 63, 0, 64 % 10]
    assert wide.tolist() == [64 << 33, 7, 5]
    assert votes.tolist() == [[22] * 64, [1] * 64, [0] * 64]


@pytest.mark.parametrize("n", [0, 1, 127, 1000])
def test_the_last_block_adds_the_parts(emulator: ModuleType, rng: np.random.Generator, n: int) -> None:
    x, parts, counter = normal(rng, n), unwritten(-(-n // 128)), np.zeros(1, np.uint32)
    result = np.zeros(1, np.float32)
    emulator.sum(x, parts, counter, result)
    assert_close(result, exact(x).sum(keepdims=True), limit=1e-5)
    assert counter[0] == 0


@pytest.mark.parametrize("n", [0, 4, 128, 1000])
def test_launches_that_overlap(emulator: ModuleType, rng: np.random.Generator, n: int) -> None:
    x, y, z = normal(rng, n), unwritten(n), unwritten(-(-n // 128) * 128)
    emulator.early(x, y, z)
    assert y.tobytes() == (2 * x).tobytes()
    assert z[:n].tobytes() == (x + y[::-1]).tobytes()
    assert not z[n:].any()


@pytest.mark.parametrize("blocks", [1, 3, 40])
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 7])
def test_blocks_relay(emulator: ModuleType, rng: np.random.Generator, blocks: int, seed: int) -> None:
    """One to four blocks at once: whoever waits for an item that was taken before does not wait in vain."""
    emulator.seed(seed)
    x, y, z = normal(rng, 40), unwritten(40), unwritten(40)
    counters = np.zeros(2, np.uint32)
    emulator.relay(x, blocks, y, z, counters)
    assert y.tobytes() == x.tobytes()
    assert_close(z, exact(x).sum() + np.arange(40), limit=1e-6)
    assert counters.tolist() == [80 + blocks, 40]


def test_blocks_are_on_the_machine_at_once(emulator: ModuleType, rng: np.random.Generator) -> None:
    """A wait for what a block does that has not begun is a deadlock."""
    x, y, z = normal(rng, 4), unwritten(4), unwritten(4)
    emulator.residents(2)
    with pytest.raises(RuntimeError, match="(?s)every block on the machine waits .* await"):
        emulator.relay(x, 3, y, z, np.array([4, 0], np.uint32))  # the first four items are nobody's


# ---- the two sides of device.cuh


def vocabulary() -> set[str]:
    """What device.cuh defines for nvcc: functions and macros."""
    text = (build.ROOT / "csrc/common/device.cuh").read_text()
    functions = re.findall(r"^__device__ __forceinline__ [\w<> ]+? (\w+)\(", text, re.MULTILINE)
    return set(functions) | set(re.findall(r"#define (MOA_\w+)", text))


def test_every_word_is_used_here() -> None:
    used = "".join(path.read_text() for path in sorted(HERE.glob("*.cu")))
    internal = {"shared_address"}
    assert len(vocabulary()) > 20
    assert {word for word in vocabulary() - internal if not re.search(rf"\b{word}\b", used)} == set()


def test_the_emulator_has_no_words_of_its_own() -> None:
    fragments = (HERE / "fragments.h").read_text().split("namespace moa {")[1]
    names = set(re.findall(r"(?:MOA_INLINE|inline) \w+ (\w+)\(", fragments)) - {"name"}
    names |= set(re.findall(r"MOA_LDMATRIX\((\w+), \d", fragments))
    assert len(names) > 8
    assert names <= vocabulary()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
@pytest.mark.parametrize("source", sorted(HERE.glob("*.cu")), ids=lambda path: path.name)
def test_nvcc_compiles_it(source: Path, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "--Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra"]
    command += [f"-I{build.ROOT / 'csrc'}", "-c", str(source), "-o", str(tmp_path / "out.o")]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
