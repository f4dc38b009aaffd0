"""What does a step of decoding cost? Few tokens, and weights that come from memory, not from the caches."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.beside import trial
from benchmarks.inputs import Shape
from benchmarks.options import Options, Trial

POINTS = (
    Shape(1, 2048, 2048, 8),
    Shape(1, 2048, 2048, 64),
    Shape(4, 2048, 2048, 8),
    Shape(16, 2048, 2048, 8),
)


def trials(options: Options) -> Iterator[Trial]:
    for dtype in options.dtypes:
        for shape in POINTS[:1] if options.quick else POINTS:
            yield trial("decode", shape, dtype, cache="cold", share=0.5)
