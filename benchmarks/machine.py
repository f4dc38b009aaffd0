"""What the figures were measured on: machine, versions, commit, and the ceilings of the kernels."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import moa_ops
from benchmarks.timer import measure

ROOT = Path(__file__).resolve().parent.parent
SLOW_GEMM = 25.0  # GF/s of a small product, below which a library has no instructions for the type
DISTURBED = 10.0  # per cent of all cores taken by others, beyond which a measurement is repeated and marked
ZEN = {23: {range(0x31): "zen", range(0x31, 0x100): "zen2"}, 26: {range(0x100): "zen5"}}
ZEN[25] = {
    range(0x10): "zen3",
    range(0x10, 0x20): "zen4",
    range(0x20, 0x60): "zen3",
    range(0x60, 0x100): "zen4",
}

XEON = {  # the servers of family 6
    85: "skylake",  # and cascadelake, cooperlake
    106: "icelake",
    108: "icelake",
    143: "sapphirerapids",
    173: "graniterapids",
    174: "graniterapids",
    207: "emeraldrapids",
}


def describe(threads: int) -> dict[str, Any]:
    """The machine: CPU, cores, threads used, instruction set of the kernels in use."""
    info = _cpuinfo()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = info.get("model name") or platform.processor() or platform.machine()
    architecture = _microarchitecture(info)
    parts = (
        re.sub(r"\(.*?\)|\bCPU\b|\b\d+-Core\b.*|@.*|\bProcessor\b", " ", cpu),
        architecture,
        f"{cores}core",
    )
    return {
        "name": "-".join(re.findall(r"[a-z0-9]+", " ".join(parts).lower())),
        "cpu": cpu,
        "microarchitecture": architecture or None,
        "family, model, stepping": ", ".join(info.get(k, "?") for k in ("cpu family", "model", "stepping")),
        "cores": cores,
        "threads": threads,
        "isa": torch.ops.moa_ops.cpu_isa(),
        "os": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, Any]:
    build = json.loads(torch.ops.moa_ops.build_info())
    return {
        "moa_ops": moa_ops.__version__,
        "built_with": f"{build['compiler']}, {build['build_type']}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> dict[str, Any]:
    """The short commit, and whether the sources of the library differ from it.

    ``MOA_COMMIT`` says it where the files were brought without git.
    """
    if said := os.environ.get("MOA_COMMIT"):
        return {"commit": said, "modified": False}
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return {"commit": head, "modified": bool(_git("status", "--porcelain", "--", "csrc", "moa_ops"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "modified": None}


def ceilings(budget: float) -> dict[str, float]:
    """The best measured here and now: GF/s of large GEMMs, GB/s (read and written) of a large copy.

    Measured up to three times if other processes are at work meanwhile: a ceiling is what is possible. What
    has no fast GEMM in bfloat16 can convert, and has float32's.
    """
    functions: dict[str, Callable[[], object]] = {}
    flop: dict[str, float] = {}
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in dtypes.items():
        sizes = (1024, 2048) if library_rate(name) > SLOW_GEMM else (128,)
        for n in sizes:
            a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
            functions[f"{name} {n}"] = lambda a=a, b=b: a @ b
            flop[f"{name} {n}"] = 2.0 * n**3
    source = torch.zeros(16 << 20)
    target = torch.empty_like(source)
    functions["copy"] = lambda: target.copy_(source)
    least: dict[str, float] = {}
    for _ in range(3):
        company = Company()
        for name, timing in measure(functions, "copy", budget=budget).items():
            least[name] = min(timing.seconds.least, least.get(name, float("inf")))
        if (company.percent()["others_percent"] or 0) < DISTURBED:
            break
    rate = {
        dtype: max(1e-9 * flop[name] / least[name] for name in flop if name.startswith(dtype))
        for dtype in dtypes
    }
    return {
        "gemm_float32_gflops": rate["float32"],
        "gemm_bfloat16_gflops": max(rate.values()),
        "copy_gbytes_per_s": 2e-9 * source.nbytes / least["copy"],
    }


@cache
def library_rate(dtype: str, gradient: bool = False) -> float:
    """GF/s of the library in a small ``F.linear``, or of the product that is its gradient.

    That is far from its best, but tells 100 from the 1 that bfloat16 has without instructions for it.
    """
    n = 128
    a, b = (torch.randn(n, n).to(getattr(torch, dtype)) for _ in range(2))
    function = (lambda: a @ b) if gradient else (lambda: torch.nn.functional.linear(a, b))
    least = measure({"gemm": function}, "gemm", budget=0.02)["gemm"].seconds.least
    return 2e-9 * n**3 / least


class Company:
    """How much of the machine other processes, or other guests of its host, took since this was made."""

    def __init__(self) -> None:
        self.before = self._read()

    def percent(self) -> dict[str, float | None]:
        """Of all cores' time: what other processes here used, and what the host gave to other guests."""
        if self.before is None or (now := self._read()) is None:
            return {"others_percent": None, "steal_percent": None}
        total, busy, steal, own = (b - a for a, b in zip(self.before, now, strict=True))
        total = max(total, 1e-9)  # less than a tick of the clock has passed
        return {"others_percent": 100 * max(0.0, busy - own) / total, "steal_percent": 100 * steal / total}

    @staticmethod
    def _read() -> tuple[float, float, float, float] | None:
        """Seconds: of all cores, of those not idle, stolen, used by this process and its children."""
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = (n / os.sysconf("SC_CLK_TCK") for n in ticks)
        busy = user + nice + system + irq + softirq
        return busy + idle + iowait + steal, busy, steal, sum(os.times()[:4])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _microarchitecture(info: dict[str, str]) -> str:
    """Where the model name does not say it: the generation, by family and model."""
    if info.get("vendor_id") == "GenuineIntel" and info.get("cpu family") == "6":
        return XEON.get(int(info["model"]), "")
    if info.get("vendor_id") != "AuthenticAMD":
        return ""
    models = ZEN.get(int(info.get("cpu family", 0)), {})
    return next((name for models_, name in models.items() if int(info["model"]) in models_), "")
