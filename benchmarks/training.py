"""How much slower is a training step? Base frozen, gradients of x, of the router and of the adapters."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.beside import trial
from benchmarks.inputs import Shape
from benchmarks.options import Options, Trial

POINTS = (Shape(512, 2048, 2048, 8), Shape(512, 1024, 1024, 64))
AIMS = {"float32": dict(zip(POINTS, (1.12, 1.32), strict=True)), "bfloat16": {}}  # two cores


def trials(options: Options) -> Iterator[Trial]:
    for dtype in options.dtypes:
        for shape in POINTS:
            aim, compile = AIMS[dtype].get(shape), not options.quick and dtype == "float32"
            yield trial("training", shape, dtype, train=True, aim=aim, compile=compile, share=1.5)
