"""How fast is expand-combine, ``y += Σ s·w·h B_eᵀ``? The mixture with next to no inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.kernels import TINY, mixture, points
from benchmarks.options import Options, Trial


def trials(options: Options) -> Iterator[Trial]:
    for dtype, shape in points(options):
        yield mixture("expand", shape.label, replace(shape, in_features=TINY), dtype)
