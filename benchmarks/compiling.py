"""Compiles what a run will want compiled before it measures anything, in a process per core.

``torch.compile`` takes one to three seconds per form, shape and direction, and keeps the result on disk.
From there it is loaded in a tenth of a second, and the process that measures has neither to wait nor company.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable

import torch

from benchmarks import beside
from benchmarks.alternatives import ALTERNATIVES, Loop
from benchmarks.inputs import DTYPES, Problem, Shape
from benchmarks.options import Options, Trial

Job = tuple[Shape, str, bool]  # a shape, a dtype, and whether it is a training step


class Blank(Problem):
    """Zeros of the right sizes: nothing is drawn, nothing compared."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.scaling = shape, dtype, 1.0
        E, r, i, o = shape.experts, shape.r, shape.in_features, shape.out_features
        self.x, self.grad_y = (
            torch.zeros(shape.tokens, i, dtype=dtype),
            torch.zeros(shape.tokens, o, dtype=dtype),
        )
        self.weight = torch.zeros(o, i, dtype=dtype)
        self.lora_A, self.lora_B = torch.zeros(E, r, i, dtype=dtype), torch.zeros(E, o, r, dtype=dtype)
        self.router_weight = torch.zeros(E, i)


def ahead(options: Options, trials: Iterable[Trial]) -> None:
    """Compiles for every trial that is going to be measured and asks for it."""
    chosen = [trial for trial in options.select(trials) if trial.case.key not in options.done]
    jobs = list(dict.fromkeys(trial.compiled for trial in chosen if trial.compiled))
    if not jobs:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    started, count = time.perf_counter(), 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(cores, 8, len(jobs)), _begin, (options.threads,)) as pool:
        for done, forms in enumerate(pool.imap_unordered(_compile, jobs), 1):
            count += forms
            if done % 20 == 0 or done == len(jobs):
                seconds = time.perf_counter() - started
                print(
                    f"{seconds:5.0f} s  compiled {count} forms for {done} of {len(jobs)} cases",
                    file=sys.stderr,
                )


def _begin(threads: int) -> None:
    """As in the run: the number of threads is part of what is compiled."""
    torch.set_num_threads(threads)
    logging.getLogger("torch").setLevel(logging.CRITICAL)


def _compile(job: Job) -> int:
    """How many forms were compiled: those that ``beside`` is going to compare, as far as zeros can tell."""
    shape, dtype, train = job
    problem = Blank(shape, DTYPES[dtype])
    point = beside.Point(problem, train)
    forms = {
        kind: kind(problem, train)
        for kind in ALTERNATIVES
        if kind.same_result and kind is not Loop and not kind.why_not(problem, train)
    }
    with torch.set_grad_enabled(train):
        seconds = {kind: point.seconds(form, form.parameters()) for kind, form in forms.items()}
        chosen = beside.worth_compiling(seconds)
        torch.compiler.reset()
        for kind in chosen:
            with contextlib.suppress(Exception):  # the run meets it again, and reports it
                point.call(torch.compile(forms[kind], dynamic=False), forms[kind].parameters())()
    return len(chosen)
