"""What does having the library cost? Time of the import, what comes with it, size and time of the build."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.options import Options, Trial
from benchmarks.record import Case
from moa_ops import _lib

IMPORT = """
import sys
from time import perf_counter as now
a = now(); import torch; b = now(); known = set(sys.modules)
c = now(); import moa_ops; d = now(); new = set(sys.modules) - known
print(b - a, d - c, len(known), len(new), len([name for name in new if name.partition(".")[0] != "moa_ops"]))
"""


def trials(options: Options) -> Iterator[Trial]:
    """The import; with ``options.build`` the build too, which takes a minute and more."""
    imported = Case("startup", "import", "", "")
    yield Trial(imported, lambda: imported.facts.update(_import(1 if options.quick else 9)) or {}, visits=1)
    if options.build:
        built = Case("startup", "build", "", "")
        yield Trial(built, lambda: built.facts.update(_build()) or {}, visits=1)


def _import(times: int) -> dict[str, Any]:
    """Medians over fresh interpreters: torch, then moa_ops in the same one, so what it adds."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    rows = []
    for _ in range(1 + times):
        command = [sys.executable, "-c", IMPORT]
        done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
        rows.append([float(word) for word in done.stdout.split()])
    columns = zip(*rows[1:], strict=True)  # the first may compile to bytecode
    torch_s, moa_ops_s, before, new, foreign = map(statistics.median, columns)
    return {
        "torch": torch_s,
        "moa_ops": moa_ops_s,
        "torch_modules": int(before),
        "modules": int(new),
        "foreign_modules": int(foreign),
        "bytes": Path(_lib._C.__file__).stat().st_size,
    }


def _build() -> dict[str, Any]:
    """Seconds to configure and compile the CPU kernels from nothing, on all cores and without ccache."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake, jobs = shutil.which("cmake", path=search), len(os.sched_getaffinity(0))
    if cmake is None:
        return {"absent": "cmake was not found"}
    with tempfile.TemporaryDirectory() as folder:
        options = ["-DMOA_CUDA=0", f"-DMOA_OUTPUT_DIR={folder}", f"-DPython_EXECUTABLE={sys.executable}"]
        start = time.perf_counter()
        for command in (
            [cmake, "-S", ROOT, "-B", folder, *options],
            [cmake, "--build", folder, "--parallel", str(jobs)],
        ):
            subprocess.run(
                command, check=True, capture_output=True, env={**os.environ, "CCACHE_DISABLE": "1"}
            )
        return {"seconds": time.perf_counter() - start, "jobs": jobs}
