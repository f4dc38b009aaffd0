"""What if some experts are far more popular than others? The mixture, forward and backward, ids given."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gram import backward
from benchmarks.inputs import POPULARITIES, Shape
from benchmarks.kernels import mixture
from benchmarks.options import Options, Trial

POINTS = (Shape(512, 1024, 1024, 64), Shape(16, 1024, 1024, 64))


def trials(options: Options) -> Iterator[Trial]:
    for dtype in options.dtypes[:1]:
        for shape in POINTS[:1] if options.quick else POINTS:
            for popularity in POPULARITIES:
                yield mixture("popularity", f"{popularity}, {shape.label}", shape, dtype, popularity)
                yield backward(
                    "popularity", f"{popularity}, backward {shape.label}", shape, dtype, popularity
                )
