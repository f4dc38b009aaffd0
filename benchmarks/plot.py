"""The first picture of a record, what a mixture costs over the plain layer; and the drawing of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.alternatives import PlainLora
from benchmarks.pictures import FAINT, INK, OURS_COLOUR, STYLE, caption
from benchmarks.record import OURS, Case

OTHER, ONE = "#E69F00", "#56B4E9"
LEGEND = ("MoALinear", "one plain LoRA, no routing", "best in plain PyTorch", "floor: arithmetic alone")
LEAST = 1.0  # per cent: the left end of a logarithmic axis


def draw(record: dict[str, Any], cases: list[Case], path: Path) -> dict[str, Path]:
    """Writes what these cases allow beside ``path``, as .png and .svg; returns the .png by title.

    The first is named as ``path`` is, the others ``<stem>-<name>``. Nothing is drawn without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {}
    with plt.rc_context(STYLE):
        for name, (title, build) in PICTURES.items():
            figure = build(plt, record, cases)
            if figure is None:
                continue
            figure.text(0.012, 0.012, caption(record), size=7.5, color="#6b7a89", ha="left", va="bottom")
            stem = f"{path.stem}-{name}" if name else path.stem
            drawn[title] = path.with_name(f"{stem}.png")
            figure.savefig(drawn[title], dpi=160)
            figure.savefig(path.with_name(f"{stem}.svg"), metadata={"Date": None})
            plt.close(figure)
    return drawn


def overview(plt: Any, record: dict[str, Any], cases: list[Case]) -> Any:
    """A row per layer: ours, one plain LoRA, the best in plain PyTorch and the floor; a panel per dtype."""
    dtypes = list(dict.fromkeys(c.dtype for c in cases if c.section == "layer"))
    if not dtypes:
        return None
    shown = {d: [c for c in cases if _shown(c) and c.dtype == d] for d in dtypes}
    rows = list(dict.fromkeys(_row(case) for chosen in shown.values() for case in chosen))
    height = 1.9 + 0.46 * len(rows)
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.6 * len(dtypes), height), sharey=False, squeeze=False
    )
    bests = [c.best_alternative() for chosen in shown.values() for c in chosen]
    right = max((_percent(best[1]) for best in bests if best), default=0)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _panel(axis, shown[dtype], rows, dtype, right=max(right, 100) * 1.4)
        axis.set_yticks(range(len(rows)), rows if dtype == dtypes[0] else [])
    by_name = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    names = [name for name in LEGEND if name in by_name]
    figure.legend(
        [by_name[name] for name in names], names, loc="upper left", bbox_to_anchor=(0.004, 0.925),
        ncols=4, handletextpad=0.1, columnspacing=1.6,
    )  # fmt: skip
    pictures.title(figure, "Extra time of a mixture of two LoRAs over the plain layer, log scale")
    figure.tight_layout(rect=(0, 0.03, 1, 0.87))
    return figure


def _shown(case: Case) -> bool:
    return case.section in ("layer", "training") and case.cache == "warm" and case.ratio(OURS) is not None


def _percent(ratio: float) -> float:
    return max(LEAST, 100 * (ratio - 1))


def _row(case: Case) -> str:
    return ("training  " if case.section == "training" else "") + case.label


def _panel(axis: Any, cases: list[Case], rows: list[str], dtype: str, right: float) -> None:
    axis.set_xscale("log")
    axis.set_xlim(LEAST * 0.9, right)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    for case in cases:
        row = rows.index(_row(case))
        ours, best, one = case.ratio(OURS), case.best_alternative(), case.ratio(PlainLora.name)
        first = case is cases[0]
        if best:
            span = [_percent(ours), _percent(best[1])]
            axis.plot(span, [row, row], color=FAINT, lw=2, zorder=1)
            axis.scatter(span[1], row, s=62, color=OTHER, zorder=3, label=LEGEND[2] if first else None)
            name, place = case.called(best[0]), (span[1], row)
            axis.annotate(name, place, xytext=(0, 7), textcoords="offset points", size=7, ha="center")
        axis.scatter(
            _percent(case.facts["floor"]), row, s=230, marker="|", color=INK, linewidths=1.7, zorder=2,
            label=LEGEND[3] if first else None,
        )  # fmt: skip
        if one is not None:
            axis.scatter(
                _percent(one), row, s=52, facecolors="white", edgecolors=ONE, linewidths=2, zorder=3,
                label=LEGEND[1] if first else None,
            )  # fmt: skip
        axis.scatter(
            _percent(ours), row, s=78, color=OURS_COLOUR, zorder=4, label=LEGEND[0] if first else None
        )
        if ours < 1:  # left of the axis: says by how much
            axis.annotate(
                f"−{100 * (1 - ours):.0f} %", (LEAST, row), xytext=(4, 6), textcoords="offset points", size=7,
                color=OURS_COLOUR, weight="bold",
            )  # fmt: skip
    ticks = [t for t in (1, 3, 10, 30, 100, 300, 1000) if t < right]
    axis.set_xticks(ticks, [f"{'≤' if t == LEAST else '+'}{t} %" for t in ticks])
    axis.minorticks_off()
    axis.tick_params(length=0)
    axis.grid(axis="x", color=FAINT, lw=0.7)
    axis.set_axisbelow(True)
    axis.set_title(dtype, loc="left", size=10, weight="bold")
    for side in axis.spines.values():
        side.set_visible(False)


PICTURES: dict[str, tuple[str, Callable[[Any, dict[str, Any], list[Case]], Any]]] = {
    "": ("extra time over the plain layer", overview),
    "scaling": ("how the cost grows with T, E and r", pictures.scaling),
    "backends": ("every way to write it", pictures.backends),
    "roofline": ("kernels under the roofs", pictures.roofline),
    "leads": ("best alternative over ours on the grid", pictures.grid),
}
