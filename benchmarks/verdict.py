"""What a record comes to: where ours loses, how much it wins on the whole, where it is far from the floor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.alternatives import PlainLora
from benchmarks.options import TOO_SLOW
from benchmarks.record import BASE, OURS, Case, Loss, losses

BAR = 0.97  # best alternative ÷ ours: no point may be under it
BESIDE = ("layer", "training", "decode", "scaling", "grid")  # sections of layers beside the alternatives


def verdict(cases: list[Case], record: dict[str, Any]) -> str:
    """Where ours loses, by how much it wins on the whole, and where it is farthest from the floor."""
    beside = [c for c in cases if c.section in BESIDE and c.lead()]
    lines = [*_means(beside)]
    missed = [
        f"{_where(c)}: {c.ratio(OURS):.3f} > {c.facts['aim']:.3f}"
        for c in [*beside, *(c for c in cases if c.section == "model")]
        if c.facts.get("aim") and c.ratio(OURS) > c.facts["aim"]
    ]
    missed += [
        f"{_where(c)}: {c.variants[OURS]['bytes'] / 1e6:.1f} > {c.facts['aim'] / 1e6:.1f} MB"
        for c in cases
        if c.section == "memory" and c.facts["aim"] and c.variants[OURS]["bytes"] > c.facts["aim"]
    ]
    few = [c for c in cases if c.section not in ("scaling", "grid")]
    ceilings = record.get("ceilings", {})
    far = sorted(beside, key=lambda c: c.ratio(OURS) / c.floor(ceilings), reverse=True)[:5]
    for title, found in (
        (
            f"Slower than an alternative (best ÷ ours, 95 % interval; the bar is {BAR})",
            map(_loss, losses(cases)),
        ),
        (
            f"Slower than {PlainLora.name} (which does a k-th of the work and routes nothing)",
            [_loss(loss) for loss in losses(few, to=PlainLora.name)],
        ),
        (
            "Farthest from the floor (arithmetic at nn.Linear's rate, bytes at the copy's)",
            [_above(case, ceilings) for case in far],
        ),
        ("Missed aims", missed),
    ):
        items = [f"- {item}" for item in found]
        lines += [f"{title}:" if items else f"{title}: none", *items]
    if left := record.get("too_slow"):
        lines += [f"Left out, as a call of nn.Linear takes over {TOO_SLOW:g} s here:"]
        lines += [f"- {key}" for key in left]
    return "\n".join(lines)


def mean_lead(cases: list[Case]) -> float:
    """Geometric mean of best alternative ÷ ours."""
    return math.exp(sum(math.log(case.lead()["median"]) for case in cases) / len(cases))


def parts(cases: list[Case]) -> str:
    """The geometric means of each dtype and direction there is, apart: "float32: forward 1.50, step 1.40"."""
    found = []
    for dtype in dict.fromkeys(case.dtype for case in cases):
        means = []
        for train, name in ((False, "forward"), (True, "step")):
            chosen = [c for c in cases if c.dtype == dtype and bool(c.facts.get("train")) == train]
            means += [f"{name} {mean_lead(chosen):.2f}"] if chosen else []
        found.append(f"{dtype}: {', '.join(means)}")
    return "; ".join(found)


def _means(cases: list[Case]) -> Iterator[str]:
    """One line per section, dtypes and directions apart."""
    for section in dict.fromkeys(case.section for case in cases):
        chosen = [case for case in cases if case.section == section]
        under = sum(case.lead()["median"] < BAR for case in chosen)
        yield (
            f"Best alternative ÷ ours, geometric mean over {len(chosen)} cases of {section}: "
            f"{mean_lead(chosen):.2f} ({parts(chosen)}); {under or 'none'} under {BAR}"
        )


def _above(case: Case, ceilings: dict[str, float]) -> str:
    """How far ours is from the floor, and how much of its extra time the two parts of the floor explain."""
    ours, floor = case.ratio(OURS), case.floor(ceilings)
    text = f"{_where(case)}: {ours / floor:.2f} × the floor ({ours:.2f} against {floor:.2f})"
    base, extra = case.variants[BASE]["seconds"]["median"], ours - 1
    if extra <= 0:
        return text
    text += f"; of {1e3 * extra * base:.3f} ms extra, {(case.facts['floor'] - 1) / extra:.0%} are arithmetic"
    if case.facts.get("moved") and ceilings:
        text += f", {1e-9 * case.facts['moved'] / ceilings['copy_gbytes_per_s'] / base / extra:.0%} bytes"
    return text


def _where(case: Case) -> str:
    cold = ", cold" if case.cache == "cold" else ""
    return f"{case.section}, {case.label}, {case.dtype}{cold}"


def _loss(loss: Loss) -> str:
    low, high = loss.interval
    if not math.isfinite(high):  # of what is far behind the best, a saved grid keeps the median
        return f"{_where(loss.case)}: {loss.other}, {loss.lead:.3f} (median alone)"
    sure = "" if loss.certain else ", within the noise"
    return f"{_where(loss.case)}: {loss.other}, {loss.lead:.3f} ({low:.3f}–{high:.3f}){sure}"
