"""What is inside a CUDA binary: architectures, and each kernel's registers and shared memory by a budget.

    python tests/cuda_binary.py FILE...            checks objects or the library against tests/cuda_budget.txt
    python tests/cuda_binary.py --update FILE...   writes the budget, to be committed with what changed it

The numbers are the largest over the architectures. A kernel may use less than its budget, never more; one
that has none, a row without a kernel, and any spill or stack is an error. Reads with ``cuobjdump``: the
toolkit's, or that of ``pip install nvidia-cuda-cuobjdump``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BUDGET = Path(__file__).with_name("cuda_budget.txt")
SHIPPED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHIPPED_PTX = ("sm_120",)
HEADER = "# registers, bytes of static shared memory, kernel: written by tests/cuda_binary.py --update\n"


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture: registers, static shared bytes, bytes of stack and local memory."""

    registers: int
    shared: int
    stack: int


def find_cuobjdump() -> Path | None:
    """On PATH, in the toolkit, or from PyPI."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump"
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = shutil.which("cuobjdump")
    candidates = [*([Path(found)] if found else []), toolkit, *sorted(site.glob("*/bin/cuobjdump"))]
    return next((path for path in candidates if path.exists()), None)


def cuobjdump(path: Path, *options: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise SystemExit("cuobjdump was not found: pip install nvidia-cuda-cuobjdump")
    done = subprocess.run([tool, *options, path], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""  # an object without device code is an error to it


def architectures(path: Path) -> tuple[set[str], set[str]]:
    """Those with machine code, and those with PTX: ``sm_80`` and so on."""
    return tuple(
        set(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)", cuobjdump(path, option)))
        for option in ("-lelf", "-lptx")
    )


def parse_usage(text: str) -> dict[tuple[str, str], Usage]:
    """From ``cuobjdump -res-usage``: (mangled kernel, architecture) to its usage."""
    found, arch, kernel = {}, "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[kernel, arch] = Usage(registers, shared, stack + local)
    return found


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """``scatter_kernel``, ``topk_kernel<float, 8, 16>``: without namespace, return type and parameters."""
    names = sorted(mangled)
    told = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: short_name(text) for name, text in zip(names, told.stdout.splitlines(), strict=True)}


def short_name(demangled: str) -> str:
    text = demangled.replace("(anonymous namespace)::", "").replace("moa::", "").removeprefix("void ")
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:at]
    return text


def usage(paths: Iterable[Path]) -> dict[str, dict[str, Usage]]:
    """Kernel to architecture to usage, over all files."""
    raw: dict[tuple[str, str], Usage] = {}
    for path in paths:
        raw.update(parse_usage(cuobjdump(path, "-res-usage")))
    names = short_names({kernel for kernel, _ in raw})
    found: dict[str, dict[str, Usage]] = {}
    for (kernel, arch), used in raw.items():
        found.setdefault(names[kernel], {})[arch] = used
    return found


def read_budget(text: str) -> dict[str, tuple[int, int]]:
    rows = (line.split(maxsplit=2) for line in text.splitlines() if line and not line.startswith("#"))
    return {kernel: (int(registers), int(shared)) for registers, shared, kernel in rows}


def write_budget(found: dict[str, dict[str, Usage]]) -> str:
    rows = [
        f"{max(u.registers for u in used.values()):3} {max(u.shared for u in used.values()):6} {kernel}\n"
        for kernel, used in sorted(found.items())
    ]
    return HEADER + "".join(rows)


def problems(
    found: dict[str, dict[str, Usage]], budget: dict[str, tuple[int, int]], archs: Iterable[str] = SHIPPED
) -> list[str]:
    """What is over budget or missing, one line each."""
    said = [f"{kernel} is in the budget but not in the binary" for kernel in budget.keys() - found.keys()]
    for kernel, used in found.items():
        said += [f"{kernel} is not compiled for {arch}" for arch in archs if arch not in used]
        said += [
            f"{kernel} on {arch}: {u.stack} bytes of stack or spills" for arch, u in used.items() if u.stack
        ]
        if kernel not in budget:
            said.append(f"{kernel} has no budget")
            continue
        registers, shared = budget[kernel]
        for arch, u in used.items():
            if u.registers > registers:
                said.append(f"{kernel} on {arch}: {u.registers} registers, budget {registers}")
            if u.shared > shared:
                said.append(f"{kernel} on {arch}: {u.shared} bytes of shared memory, budget {shared}")
    return sorted(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--update", action="store_true", help="write the budget instead of checking it")
    args = parser.parse_args()
    found = usage(args.files)
    if args.update:
        BUDGET.write_text(write_budget(found))
    said = problems(found, read_budget(BUDGET.read_text()))
    for line in said:
        print(line, file=sys.stderr)
    binaries = sum(map(len, found.values()))
    print(f"{len(found)} kernels, {binaries} with their architectures: {len(said)} problems")
    raise SystemExit(bool(said))


if __name__ == "__main__":
    main()
