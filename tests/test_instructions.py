"""The gate on instruction counts; the counts themselves are ``make instruction-check``'s."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import instructions
from instructions import Counts

DUMP = "events: Ir\nsummary: 1234\n\nfl=(1) micro.h\nfn=(1) dot\n10 1200\n12 34\ntotals: 1234\n"
BUDGET = Counts("GCC 12", {"mid: shrink": 10000, "mid: expand": 20000})


def counted(shrink: int = 10000, compiler: str = "GCC 12", **more: int) -> Counts:
    return Counts(compiler, {**BUDGET.cases, "mid: shrink": shrink, **more})


def test_dump_is_read() -> None:
    assert instructions.total(DUMP) == 1234
    with pytest.raises(SystemExit, match="no line `totals:`"):
        instructions.total(DUMP.replace("totals", "total"))


def test_budget_is_kept() -> None:
    assert instructions.read_budget(instructions.write_budget(BUDGET)) == BUDGET


def test_a_slower_kernel_is_found() -> None:
    assert instructions.problems(counted(), BUDGET) == []
    assert instructions.problems(counted(10200), BUDGET) == []
    assert instructions.problems(counted(10201), BUDGET) == [
        "mid: shrink: 10201 instructions, +2.0 % on the budget of 10000"
    ]
    assert instructions.problems(counted(extra=1), BUDGET) == ["extra has no budget"]
    missing = Counts("GCC 12", {"mid: shrink": 10000})
    assert instructions.problems(missing, BUDGET) == ["mid: expand is in the budget but was not run"]


def test_another_compiler_has_more_room() -> None:
    assert instructions.problems(counted(15000, "Clang 19"), BUDGET) == []
    assert len(instructions.problems(counted(15001, "Clang 19"), BUDGET)) == 1


def test_a_gain_is_said() -> None:
    assert instructions.gains(counted(9800), BUDGET) == []
    assert instructions.gains(counted(9000), BUDGET) == [
        "mid: shrink: 9000 instructions, -10.0 % on the budget of 10000"
    ]
    assert instructions.gains(counted(extra=1), BUDGET) == []


def test_the_committed_budget_covers_every_kernel_and_shape() -> None:
    budget = instructions.read_budget(instructions.BUDGET.read_text())
    shapes, kernels = ({case.split(": ")[i] for case in budget.cases} for i in (0, 1))
    assert {f"{shape}: {kernel}" for shape in shapes for kernel in kernels} == set(budget.cases)
    assert {"decode", "mid", "many experts"} <= shapes
    assert {"layer", "backward", "router", "routing", "shrink", "expand", "gram of A"} <= kernels


def test_the_command_fails_over_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command on invented counts, with a budget file of its own."""
    monkeypatch.setattr(instructions, "BUDGET", tmp_path / "budget.txt")

    def run(found: Counts, *options: str) -> int:
        monkeypatch.setattr(instructions, "count", lambda program: found)
        monkeypatch.setattr(sys, "argv", ["instructions.py", *options, "program"])
        with pytest.raises(SystemExit) as stopped:
            instructions.main()
        return int(stopped.value.code)

    assert run(counted(), "--update") == 0
    assert run(counted()) == 0
    assert run(counted(11000)) == 1
    assert capsys.readouterr().err == "mid: shrink: 11000 instructions, +10.0 % on the budget of 10000\n"
    assert run(counted(9000)) == 0
    assert "UPDATE=1 keeps the gain" in capsys.readouterr().out
    assert run(counted(11000), "--update") == 0
    assert run(counted(11000)) == 0


def test_without_valgrind_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="valgrind was not found; install it"):
        instructions.count(Path("program"))
