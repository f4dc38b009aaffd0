"""What a record comes to: where ours loses, how much it wins on the whole, where it is far from the floor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.alternatives import PlainLora
from benchmarks.record import OURS, Case, Loss, losses

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
        ("Farthest from the floor", [_above(case, ceilings) for case in far]),
        ("Missed aims", missed),
    ):
        items = [f"- {item}" for item in found]
        lines += [f"{title}:" if items else f"{title}: none", *items]
    return "\n".join(lines)


def mean_lead(cases: list[Case]) -> float:
    """Geometric mean of best alternative ÷ ours."""
    return math.exp(sum(math.log(case.lead()["median"]) for case in cases) / len(cases))


def _means(cases: list[Case]) -> Iterator[str]:
    """One line per section, the directions of a section with both apart."""
    for section in dict.fromkeys(case.section for case in cases):
        chosen = [case for case in cases if case.section == section]
        text = f"Best alternative ÷ ours, geometric mean over {len(chosen)} cases of {section}: "
        text += f"{mean_lead(chosen):.2f}"
        parts = [[c for c in chosen if bool(c.facts.get("train")) == train] for train in (False, True)]
        if all(parts):
            text += " (forward {:.2f}, step {:.2f})".format(*map(mean_lead, parts))
        under = sum(case.lead()["median"] < BAR for case in chosen)
        yield f"{text}; {under or 'none'} under {BAR}"


def _above(case: Case, ceilings: dict[str, float]) -> str:
    ours, floor = case.ratio(OURS), case.floor(ceilings)
    return f"{_where(case)}: {ours / floor:.2f} × the floor ({ours:.2f} against {floor:.2f})"


def _where(case: Case) -> str:
    cold = ", cold" if case.cache == "cold" else ""
    return f"{case.section}, {case.label}, {case.dtype}{cold}"


def _loss(loss: Loss) -> str:
    low, high = loss.interval
    if not math.isfinite(high):  # of what is far behind the best, a saved grid keeps the median
        return f"{_where(loss.case)}: {loss.other}, {loss.lead:.3f} (median alone)"
    sure = "" if loss.certain else ", within the noise"
    return f"{_where(loss.case)}: {loss.other}, {loss.lead:.3f} ({low:.3f}–{high:.3f}){sure}"
