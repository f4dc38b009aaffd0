"""The gate on registers and spills, and, where CUDA is built, the architectures in the library."""

from __future__ import annotations

from dataclasses import replace

import pytest

import cuda_binary
from cuda_binary import Usage
from moa_ops import _lib, info

DUMP = """
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3moa12_GLOBAL__N_16kernelIfLi8EEEvNS_10SortParamsE:
  REG:32 STACK:0 SHARED:128 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
Fatbin elf code:
================
arch = sm_90
 Function _ZN3moa12_GLOBAL__N_16kernelIfLi8EEEvNS_10SortParamsE:
  REG:40 STACK:8 SHARED:1152 LOCAL:16 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
KERNEL = "kernel<float, 8>"
FOUND = {KERNEL: {"sm_80": Usage(32, 128, 0), "sm_90": Usage(40, 1152, 0)}}


def test_dump_is_read() -> None:
    mangled = "_ZN3moa12_GLOBAL__N_16kernelIfLi8EEEvNS_10SortParamsE"
    assert cuda_binary.parse_usage(DUMP) == {
        (mangled, "sm_80"): Usage(32, 128, 0),
        (mangled, "sm_90"): Usage(40, 1152, 24),
    }
    assert cuda_binary.short_names([mangled]) == {mangled: KERNEL}


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("moa::(anonymous namespace)::scatter_kernel(moa::SortParams)", "scatter_kernel"),
        ("void moa::(anonymous namespace)::topk<float, (int)8>(moa::P, int*)", "topk<float, (int)8>"),
    ],
)
def test_short_names(demangled: str, short: str) -> None:
    assert cuda_binary.short_name(demangled) == short


def test_budget_is_kept() -> None:
    budget = cuda_binary.read_budget(cuda_binary.write_budget(FOUND))
    assert budget == {KERNEL: (40, 1152)}
    archs = ("sm_80", "sm_90")
    assert cuda_binary.problems(FOUND, budget, archs) == []

    def with_sm_90(**change: int) -> dict:
        return {KERNEL: {**FOUND[KERNEL], "sm_90": replace(FOUND[KERNEL]["sm_90"], **change)}}

    def said(found: dict, told: dict = budget, archs: tuple = archs) -> str:
        (line,) = cuda_binary.problems(found, told, archs)
        return line

    assert said(with_sm_90(registers=41)) == f"{KERNEL} on sm_90: 41 registers, budget 40"
    assert said(with_sm_90(shared=1153)) == f"{KERNEL} on sm_90: 1153 bytes of shared memory, budget 1152"
    assert said(with_sm_90(stack=8)) == f"{KERNEL} on sm_90: 8 bytes of stack or spills"
    assert said(FOUND, {}) == f"{KERNEL} has no budget"
    assert said(FOUND, {**budget, "gone": (1, 0)}) == "gone is in the budget but not in the binary"
    assert said(FOUND, archs=(*archs, "sm_120")) == f"{KERNEL} is not compiled for sm_120"


@pytest.mark.skipif(not info.collect()["cuda"]["built"], reason="this library was built without CUDA")
@pytest.mark.skipif(cuda_binary.find_cuobjdump() is None, reason="pip install nvidia-cuda-cuobjdump")
def test_the_library_holds_what_info_says() -> None:
    told = info.collect()["cuda"]["architectures"]
    machine, ptx = cuda_binary.architectures(_lib._C.__file__)
    assert machine == {f"sm_{arch.removesuffix('-real')}" for arch in told}
    assert ptx == {f"sm_{arch}" for arch in told if not arch.endswith("-real")}
