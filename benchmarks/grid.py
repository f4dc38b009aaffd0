"""Does anything in plain PyTorch beat us anywhere? T 1–8192, E 2–256, r 4–128, k 1–4, widths 256–4096.

The full product of these has some hundred thousand points. Measured are, each forward and as a training step:

- **scans**: from one centre along every axis, and from a decoding step along the axes that matter there;
- **corners**: all 32 of the five ranges;
- **sample**: a fixed Latin hypercube, in and out widths independent: every axis is covered evenly. It holds
  odd T, E that are no powers of two, and oblong layers.

Two limits keep it to 40 minutes and 6 GB: adapters of at most ``VALUES`` elements (a larger point is measured
with a lower r), and a base of at most ``FLOP`` operations (with a lower T). bfloat16 takes every
``BFLOAT16_EVERY``-th point. Where compiling may gain something (``compiled``) the forms near the best are
compiled too, all before anything is measured (``compiling.py``). A point that seems lost is measured again
for four times as long, alone with what came near, before it is called lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from benchmarks.beside import trial
from benchmarks.inputs import Shape
from benchmarks.options import Options, Trial

VALUES = 64 << 20
FLOP = 2**34
BFLOAT16_EVERY = 3
VISITED_AGAIN = 6  # every so many points: enough to know how far two visits are apart, see noise.py
COMPILED_TOKENS, COMPILED_RANKS = 256, 64  # to so many tokens, and to so many ranks of all experts
SHARE = 0.2  # of the budget per case, for a forward; a training step takes SHARE_STEP
SHARE_STEP = 0.3

CENTRE = Shape(512, 1024, 1024, 16)
DECODE = Shape(1, 2048, 2048, 8)
LARGEST = Shape(8192, 2048, 2048, 8)  # beyond FLOP, once

TOKENS = tuple(2**n for n in range(14))
EXPERTS = (2, 4, 8, 16, 32, 64, 128, 256)
RANKS = (4, 8, 16, 32, 64, 128)
TOP_K = (1, 2, 3, 4)
WIDTHS = ((256, 256), (512, 512), (2048, 2048), (4096, 4096), (1024, 4096), (4096, 1024))

SAMPLES = 64
SAMPLED = {
    "tokens": (1, 2, 3, 5, 8, 13, 24, 33, 64, 100, 160, 256, 400, 513, 1024, 2000, 4096, 8192),
    "experts": (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 128, 200, 256),
    "r": (4, 8, 12, 16, 24, 32, 48, 64, 96, 128),
    "top_k": TOP_K,
    "in_features": (256, 384, 512, 768, 1024, 1536, 2048, 2816, 4096),
    "out_features": (256, 384, 512, 768, 1024, 1536, 2048, 2816, 4096),
}


def scans() -> list[Shape]:
    """Single axes through ``CENTRE``: what :mod:`benchmarks.scaling` shows."""
    return list(
        dict.fromkeys(
            [
                *(replace(CENTRE, tokens=t) for t in TOKENS),
                *(replace(CENTRE, experts=e) for e in EXPERTS),
                *(replace(CENTRE, r=r) for r in RANKS),
                *(replace(CENTRE, top_k=k) for k in TOP_K),
                *(replace(CENTRE, in_features=i, out_features=o) for i, o in WIDTHS),
            ]
        )
    )


def decoding() -> list[Shape]:
    """The ends of the axes through ``DECODE``, and some more tokens."""
    return [
        *(replace(DECODE, tokens=t) for t in (1, 4, 16, 64)),
        *(replace(DECODE, experts=e) for e in (2, 64, 256)),
        *(replace(DECODE, r=r) for r in (4, 64)),
        *(replace(DECODE, top_k=k) for k in (1, 4)),
        *(replace(DECODE, in_features=w, out_features=w) for w in (256, 4096)),
    ]


def corners() -> list[Shape]:
    """All ends of all ranges, within the limits."""
    ranges = product((1, 8192), (256, 4096), (2, 256), (4, 128), (1, 4))
    return [within(Shape(t, w, w, e, r, min(k, e))) for t, w, e, r, k in ranges]


def sample(count: int = SAMPLES, seed: int = 5) -> list[Shape]:
    """A Latin hypercube: each axis in ``count`` strata of equal width in the list, shuffled on its own."""
    shuffle = random.Random(seed)
    columns = {}
    for axis, values in SAMPLED.items():
        columns[axis] = [values[i * len(values) // count] for i in range(count)]
        shuffle.shuffle(columns[axis])
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [within(Shape(**{**row, "top_k": min(row["top_k"], row["experts"])})) for row in rows]


def within(shape: Shape) -> Shape:
    """With r, then T, halved until adapters and base are within the limits."""
    while shape.adapter_values > VALUES:
        shape = replace(shape, r=shape.r // 2)
    while shape.base_flop > FLOP:
        shape = replace(shape, tokens=shape.tokens // 2)
    return shape


def points() -> list[Shape]:
    """Every point once, in an order that does not change."""
    return list(dict.fromkeys([*scans(), *decoding(), *corners(), *sample(), LARGEST]))


def compiled(shape: Shape) -> bool:
    """Whether forms are compiled here too: where passes over memory, not products, take most of the time."""
    return shape.tokens <= COMPILED_TOKENS or shape.experts * shape.r <= COMPILED_RANKS


def both_directions(section: str, shape: Shape, dtype: str, **settings: Any) -> Iterator[Trial]:
    """A forward and a training step at this point; ``settings`` as :func:`benchmarks.beside.trial` has."""
    for train, share in ((False, SHARE), (True, SHARE_STEP)):
        label = f"{shape.label} {'step' if train else 'forward'}"
        yield trial(section, shape, dtype, train=train, label=label, share=share, sure=True, **settings)


def trials(options: Options) -> Iterator[Trial]:
    """All of it, whether quick or not: quick only lowers the budget."""
    for dtype in options.dtypes:
        for number, shape in enumerate(points()[:: 1 if dtype == "float32" else BFLOAT16_EVERY]):
            visits = 2 if number % VISITED_AGAIN == 0 else 1
            yield from both_directions("grid", shape, dtype, compile=compiled(shape), visits=visits)
