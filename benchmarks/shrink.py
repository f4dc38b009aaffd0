"""How fast is shrink, ``h = x A_eᵀ`` for the experts of each token? The mixture with next to no outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.kernels import TINY, mixture, points
from benchmarks.options import Options, Trial


def trials(options: Options) -> Iterator[Trial]:
    for dtype, shape in points(options):
        yield mixture("shrink", shape.label, replace(shape, out_features=TINY), dtype)
