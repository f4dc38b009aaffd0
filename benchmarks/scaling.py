"""How does the cost grow with T, E, r, k and the width? The scans of the grid, thinned, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.grid import CENTRE, both_directions
from benchmarks.inputs import Shape
from benchmarks.options import Options, Trial

AXES = {
    "tokens": (1, 8, 64, 512, 4096),
    "experts": (2, 8, 16, 64, 256),
    "r": (4, 16, 64, 128),
    "top_k": (1, 2, 4),
    "width": (256, 1024, 4096),
}
QUICK_AXES = {"tokens": (1, 64, 512), "experts": (16, 64), "r": (16, 64)}


def along(axis: str, value: int) -> Shape:
    """The centre with one axis at ``value``; the width is that of both sides."""
    if axis == "width":
        return replace(CENTRE, in_features=value, out_features=value)
    return replace(CENTRE, **{axis: value})


def points(quick: bool) -> list[Shape]:
    axes = QUICK_AXES if quick else AXES
    return list(dict.fromkeys(along(axis, value) for axis, values in axes.items() for value in values))


def trials(options: Options) -> Iterator[Trial]:
    for shape in points(options.quick) if "float32" in options.dtypes else ():
        yield from both_directions("scaling", shape, "float32")
