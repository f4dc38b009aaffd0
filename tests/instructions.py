"""Instructions that the CPU kernels execute on fixed shapes, by a budget: a slow-down found without a clock.

    python tests/instructions.py PROGRAM            counts and checks against tests/instruction_budget.txt
    python tests/instructions.py --update PROGRAM   writes the budget, to be committed with what changed it

PROGRAM is CMake's target ``moa_instructions`` (tests/instructions.cpp), which runs every case once; callgrind
counts it. Two runs give the same numbers to the last digit: one thread, fixed data, and the processor that
valgrind imitates. What differs is the compiler, so the budget says which one it is of, and another one is
allowed more (``TOLERANCE``, ``FOREIGN``). Instructions are not time: cache misses and waits do not show, and
valgrind knows no AVX-512, so the AVX2 kernels stand for those made from the same sources.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

BUDGET = Path(__file__).with_name("instruction_budget.txt")
TOLERANCE = 0.02  # of the budget's own compiler: its patch releases, the C library's memcpy
FOREIGN = 0.5  # of any other: GCC 11, Clang 16 and Clang 19 execute 0.72 to 1.37 times what GCC 12 does
NO_VALGRIND = "instruction-check: valgrind was not found; install it (apt-get install valgrind) and try again"
COLLECT = ("--toggle-collect=measured", "--zero-before=measured", "--dump-after=measured")


@dataclass(frozen=True)
class Counts:
    """Instructions by case, "mid: layer" and so on, and the compiler that made the kernels: "GCC 12"."""

    compiler: str
    cases: dict[str, int]


def count(program: Path) -> Counts:
    """Runs ``program`` under callgrind."""
    if shutil.which("valgrind") is None:
        raise SystemExit(NO_VALGRIND)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", *COLLECT, program]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"instruction-check: the count failed\n{done.stderr}")
        compiler, *names = done.stdout.splitlines()
        dumps = [Path(f"{out}.{i}").read_text() for i in range(1, len(names) + 1)]
        return Counts(compiler, dict(zip(names, map(total, dumps), strict=True)))


def total(dump: str) -> int:
    """Instructions in one of callgrind's files."""
    found = re.search(r"^totals: (\d+)$", dump, re.MULTILINE)
    if found is None:
        raise SystemExit("instruction-check: a file of callgrind holds no line `totals:`")
    return int(found.group(1))


def write_budget(counts: Counts) -> str:
    """The text of the budget file."""
    rows = [f"{n:10} {case}\n" for case, n in counts.cases.items()]
    head = "# instructions, shape and kernel: written by tests/instructions.py --update, compiled with\n"
    return f"{head}{counts.compiler}\n{''.join(rows)}"


def read_budget(text: str) -> Counts:
    """The reverse of :func:`write_budget`."""
    compiler, *rows = (line for line in text.splitlines() if line and not line.startswith("#"))
    pairs = (row.split(maxsplit=1) for row in rows)
    return Counts(compiler, {case: int(n) for n, case in pairs})


def tolerance(found: Counts, budget: Counts) -> float:
    """By which part of its budget a case may exceed it."""
    return TOLERANCE if found.compiler == budget.compiler else FOREIGN


def problems(found: Counts, budget: Counts) -> list[str]:
    """What is over budget or missing, one line each."""
    said = [f"{case} is in the budget but was not run" for case in budget.cases if case not in found.cases]
    for case, n in found.cases.items():
        if case not in budget.cases:
            said.append(f"{case} has no budget")
        elif n > budget.cases[case] * (1 + tolerance(found, budget)):
            said.append(f"{case}: {change(n, budget.cases[case])}")
    return said


def gains(found: Counts, budget: Counts) -> list[str]:
    """What is so far under its budget that the budget no longer guards it."""
    pairs = [(case, n, budget.cases.get(case, 0)) for case, n in found.cases.items()]
    return [f"{case}: {change(n, was)}" for case, n, was in pairs if n < was * (1 - tolerance(found, budget))]


def change(now: int, budget: int) -> str:
    return f"{now} instructions, {100 * (now / budget - 1):+.1f} % on the budget of {budget}"


def main() -> None:
    """Checks, or with --update writes; exits with 1 where something is over budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=Path)
    parser.add_argument("--update", action="store_true", help="write the budget instead of checking it")
    args = parser.parse_args()
    found = count(args.program)
    if args.update:
        BUDGET.write_text(write_budget(found))
    budget = read_budget(BUDGET.read_text())
    over, under = problems(found, budget), gains(found, budget)
    for line in over:
        print(line, file=sys.stderr)
    for line in under:
        print(f"{line}; UPDATE=1 keeps the gain")
    allowed = 100 * tolerance(found, budget)
    print(
        f"{len(found.cases)} cases, {found.compiler}, budget of {budget.compiler} and {allowed:.0f} % more: "
        f"{len(over)} problems"
    )
    raise SystemExit(bool(over))


if __name__ == "__main__":
    main()
