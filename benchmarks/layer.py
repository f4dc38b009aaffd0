"""How much slower is a layer with a mixture than the plain layer? Forward, own router, from Python."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.beside import trial
from benchmarks.inputs import Shape
from benchmarks.options import Options, Trial

POINTS = (
    Shape(512, 2048, 2048, 8),
    Shape(512, 1024, 1024, 8),
    Shape(512, 1024, 1024, 64),
    Shape(2048, 1024, 1024, 256),
    Shape(16, 2048, 2048, 8),
    Shape(1, 2048, 2048, 8),
)
AIMS = {  # the layer / nn.Linear that two cores should reach
    "float32": dict(zip(POINTS, (1.055, 1.095, 1.20, 1.45, 1.09, 1.12), strict=True)),
    "bfloat16": {POINTS[0]: 1.08},
}


def trials(options: Options) -> Iterator[Trial]:
    """MoALinear, one plain LoRA and the PyTorch forms, all over one weight; in float32 the best compiled."""
    for dtype in options.dtypes:
        for shape in POINTS:
            compile = dtype == "float32" and not options.quick
            yield trial("layer", shape, dtype, aim=AIMS[dtype].get(shape), compile=compile)
