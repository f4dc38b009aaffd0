"""For people used to pytest-benchmark: ``pytest benchmarks --benchmark-only``; ``-k shrink`` for one file.

The tests of a group are ways to the same result, checked once, at one point of a quick run.
``python -m benchmarks`` says more: paired ratios, floors, what is lost.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.__main__ import DEFAULT, SECTIONS
from benchmarks.options import Functions, Options, Trial

TRIALS = [trial for section in DEFAULT for trial in SECTIONS[section](Options(quick=True))]
CASES = [(trial, name) for trial in TRIALS for name in trial.names]


def identifier(trial: Trial, name: str) -> str:
    case = trial.case
    return f"{case.section}, {case.label}, {case.dtype}: {name}".replace("→", "-").replace(" ", "_")


@functools.lru_cache(maxsize=1)
def prepared(number: int) -> Functions:
    """What is timed of one trial; the tests of a trial follow each other."""
    torch.set_num_threads(2)
    trial = TRIALS[number]
    with torch.set_grad_enabled(trial.grad):
        return trial.prepare()


@pytest.mark.parametrize(("trial", "name"), CASES, ids=[identifier(*case) for case in CASES])
def test_benchmark(benchmark, trial: Trial, name: str) -> None:
    function = prepared(TRIALS.index(trial)).get(name)
    if function is None:
        pytest.skip(trial.case.variants.get(name, {}).get("absent", "not at this point"))
    benchmark.group = f"{trial.case.section}, {trial.case.label}, {trial.case.dtype}"
    with torch.set_grad_enabled(trial.grad):
        benchmark(function)
