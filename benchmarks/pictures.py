"""The pictures of a record beside the first: scaling, backends, roofline, grid. Each takes what it finds.

The palette is Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart with every kind of colour
vision; no two series share a marker either.
"""

from __future__ import annotations

from typing import Any

from benchmarks.alternatives import COMPILED, DenseMasked, GatherBmm, GroupedMM, Loop, PlainLora
from benchmarks.grid import CENTRE
from benchmarks.record import OURS, Case
from benchmarks.verdict import mean_lead

INK, FAINT, GREY = "#22313f", "#dfe4ea", "#8795a1"
OURS_COLOUR = "#0072B2"
SERIES = {  # colour and marker
    OURS: (OURS_COLOUR, "o"),
    DenseMasked.name: ("#E69F00", "s"),
    GroupedMM.name: ("#009E73", "^"),
    Loop.name: ("#CC79A7", "D"),
    GatherBmm.name: ("#D55E00", "v"),
    COMPILED: ("#7a5195", "P"),
    PlainLora.name: ("#56B4E9", "X"),
}
NAMES = {OURS: "MoALinear", PlainLora.name: "one plain LoRA, no routing", COMPILED: "best of them, compiled"}
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "moa_ops",
    "svg.fonttype": "none",
}


def title(figure: Any, text: str) -> None:
    """The heading; the panels' layout leaves its room by itself."""
    figure.suptitle(text, x=0.012, ha="left", weight="bold", size=13).set_in_layout(False)


def caption(record: dict[str, Any]) -> str:
    """The machine and the commit, for the foot of a picture."""
    machine = record["machine"]
    cpu = " ".join(filter(None, (machine["cpu"], machine["microarchitecture"])))
    text = (
        f"{cpu}, {machine['threads']} threads, "
        f"{machine['isa']}, torch {record['versions']['torch']}, commit {record['commit']}, "
        f"{record['date']}; r=16 and k=2 where nothing is said, own router included"
    )
    return text + ("; quick run" if record["settings"]["quick"] else "")


# ---------------------------------------------------------------------------------------------------- scaling

AXES = {"tokens": "tokens T", "experts": "experts E", "r": "rank r"}


def scaling(plt: Any, record: dict[str, Any], cases: list[Case]) -> Any:
    """Time over nn.Linear's along T, E and r through the centre; forward above, training step below."""
    lines = {(axis, train): _along(cases, axis, train) for axis in AXES for train in (False, True)}
    if min(map(len, lines.values())) < 2:
        return None
    figure, axes = plt.subplots(2, len(AXES), figsize=(11.4, 6.6), sharey="row", sharex="col")
    for row, train in enumerate((False, True)):
        lowest = min(case.ratio(OURS) for axis in AXES for _, case in lines[axis, train])
        for column, axis in enumerate(AXES):
            panel = axes[row][column]
            _scaling_panel(panel, lines[axis, train], min(0.97, 0.95 * lowest), record.get("ceilings", {}))
            others = {"tokens": "E=16, r=16", "experts": "T=512, r=16", "r": "T=512, E=16"}[axis]
            panel.set_title(f"{'training step' if train else 'forward'}, {others}")
            if row:
                panel.set_xlabel(AXES[axis])
        axes[row][0].set_ylabel("time ÷ nn.Linear")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.004, 0.945),
        ncols=len(names),
        columnspacing=1.0,
        handlelength=1.6,
    )
    width = f"{CENTRE.in_features}→{CENTRE.out_features}"
    title(figure, f"What a mixture of two LoRAs costs, {width}, float32, log scales")
    figure.tight_layout(rect=(0, 0.03, 1, 0.905), h_pad=1.4, w_pad=1.6)
    return figure


def _along(cases: list[Case], axis: str, train: bool) -> list[tuple[int, Case]]:
    """Values of the axis and cases in float32 that differ from the centre in it alone, in order."""
    found = {}
    for case in cases:
        shape = case.facts.get("shape")
        if case.section not in ("scaling", "grid") or case.dtype != "float32" or case.facts["train"] != train:
            continue
        if case.ratio(OURS) and all(shape[f] == v for f, v in vars(CENTRE).items() if f != axis):
            found[shape[axis]] = case
    return sorted(found.items())


def _scaling_panel(
    panel: Any, line: list[tuple[int, Case]], bottom: float, ceilings: dict[str, float]
) -> None:
    values = [value for value, _ in line]
    floor = [case.floor(ceilings) for _, case in line]
    panel.plot(values, floor, color=INK, lw=1.3, ls=(0, (4, 3)), label="floor", zorder=2)
    for name, (colour, marker) in SERIES.items():
        pairs = [(value, case.ratio(name)) for value, case in line if case.ratio(name)]
        if not pairs:
            continue
        ours = name == OURS
        panel.plot(
            *zip(*pairs, strict=True), color=colour, marker=marker, ms=5.5 if ours else 4,
            lw=2.6 if ours else 1.3, label=NAMES.get(name, name), zorder=5 if ours else 3,
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    shown = values if len(values) <= 8 else values[::3]
    panel.set_xticks(shown, [str(value) for value in shown])
    panel.set_ylim(bottom, 8)
    ticks = [tick for tick in (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 8) if tick >= bottom]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.tick_params(length=0)
    panel.grid(axis="y", color=FAINT, lw=0.7)
    panel.set_axisbelow(True)


# --------------------------------------------------------------------------------------------------- backends

CAP = 250.0  # per cent: longer bars are cut, their value stands above them, of neighbours at two heights


def backends(plt: Any, record: dict[str, Any], cases: list[Case]) -> Any:
    """Bars of extra time over nn.Linear for every form, grouped by layer; a panel per dtype."""
    chosen = [c for c in cases if c.section in ("layer", "training") and c.ratio(OURS) and c.cache == "warm"]
    dtypes = list(dict.fromkeys(case.dtype for case in chosen))
    if not dtypes:
        return None
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(12.4, 1.0 + 3.0 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        _bars(axis, [case for case in chosen if case.dtype == dtype], dtype)
    by_name = {
        name: handle for a in axes[:, 0] for handle, name in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        by_name.values(), by_name, loc="upper left", ncols=len(by_name), handlelength=1, handleheight=1,
        bbox_to_anchor=(0.004, 1 - 0.28 / figure.get_figheight()), columnspacing=1.4,
    )  # fmt: skip
    title(figure, "Extra time over nn.Linear of every way to write the mixture")
    figure.tight_layout(rect=(0, 0.03, 1, 1 - 0.55 / figure.get_figheight()), h_pad=1.6)
    return figure


def _bars(axis: Any, cases: list[Case], dtype: str) -> None:
    names = [name for name in SERIES if any(case.ratio(name) for case in cases)]
    width = 0.86 / len(names)
    present = [[name for name in names if case.ratio(name)] for case in cases]
    for name in names:
        bars = [(i, 100 * (case.ratio(name) - 1)) for i, case in enumerate(cases) if case.ratio(name)]
        xs = [i + (present[i].index(name) - (len(present[i]) - 1) / 2) * width for i, _ in bars]
        heights = [min(max(percent, 0), CAP) for _, percent in bars]
        axis.bar(xs, heights, width * 0.9, color=SERIES[name][0], label=NAMES.get(name, name), zorder=2)
        for x, height, (i, percent) in zip(xs, heights, bars, strict=True):
            weight, up = "bold" if name == OURS else "normal", 4
            if percent > CAP:
                ends = [x - width * 0.45, x + width * 0.45]
                axis.plot(ends, [CAP - 14, CAP - 8], color="white", lw=2, zorder=3)
                up += 17 if name in _raised(cases[i], present[i]) else 0
            axis.text(x, height + up, f"{round(percent)}", ha="center", va="bottom", size=6.8, weight=weight)
    axis.set_xlim(-0.5, len(cases) - 0.5)
    axis.set_ylim(0, CAP * 1.15)
    kinds = ["training step" if case.section == "training" else "forward" for case in cases]
    labels = [f"{kind}\n{_shape(case)}\n{_widths(case)}" for kind, case in zip(kinds, cases, strict=True)]
    axis.set_xticks(range(len(cases)), labels, size=8.5)
    axis.set_yticks([0, 50, 100, 150, 200, 250], ["0", "+50 %", "+100 %", "+150 %", "+200 %", "+250 %"])
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="y", color=FAINT, lw=0.7)
    axis.set_axisbelow(True)
    axis.set_title(dtype, pad=9)


def _raised(case: Case, names: list[str]) -> list[str]:
    """Of neighbouring bars that are cut, every second: its value stands above those beside it."""
    raised: list[str] = []
    for before, name in zip(names, names[1:], strict=False):
        cut = min(case.ratio(before), case.ratio(name)) > 1 + CAP / 100
        raised += [name] if cut and before not in raised else []
    return raised


# --------------------------------------------------------------------------------------------------- roofline

KERNELS = {  # what a label begins with: name, colour
    ("routing", "linear_routing"): ("router", "#009E73"),
    ("shrink", ""): ("shrink", "#0072B2"),
    ("expand", ""): ("expand-combine", "#E69F00"),
    ("gram", "gram"): ("gram", "#CC79A7"),
    ("gram", "backward"): ("whole backward", "#D55E00"),
}
MARKERS = ("o", "s", "^", "D")
MOST = 400  # FLOP per byte: the right end
ASIDE = {"shrink": -1.5, "expand-combine": -0.5, "gram": 0.5, "whole backward": 1.5}  # they share a place


def roofline(plt: Any, record: dict[str, Any], cases: list[Case]) -> Any:
    """FLOP per byte against FLOP per second, under the measured copy and GEMM; a panel per dtype."""
    chosen = [(kernel, c) for c in cases for kernel in [_kernel(c)] if kernel and c.ratio(OURS)]
    dtypes = list(dict.fromkeys(case.dtype for _, case in chosen))
    if not dtypes or not record.get("ceilings"):
        return None
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.9 * len(dtypes), 4.9), squeeze=False, sharey=True)
    shapes = list(dict.fromkeys(_shape(case) for _, case in chosen))
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _roofs(axis, record["ceilings"], dtype)
        for kernel, case in (pair for pair in chosen if pair[1].dtype == dtype):
            seconds = case.variants[OURS]["seconds"]["median"]
            marker = MARKERS[shapes.index(_shape(case)) % 4]
            aside = 1.12 ** ASIDE.get(kernel[0], 0)
            x, y = case.facts["flop"] / case.facts["bytes"] * aside, 1e-9 * case.facts["flop"] / seconds
            axis.scatter(
                x, y, s=58, color=kernel[1], marker=marker, edgecolors="white", linewidths=0.8, zorder=4
            )
        axis.set_title(dtype)
    axes[0][0].set_ylabel("GF/s")
    _roofline_legend(figure, [kernel for kernel, _ in chosen], shapes)
    title(figure, "The kernels under the roofs measured in the same run")
    figure.tight_layout(rect=(0, 0.03, 1, 0.84), w_pad=2)
    return figure


def _kernel(case: Case) -> tuple[str, str] | None:
    found = (
        v
        for (section, start), v in KERNELS.items()
        if case.section == section and case.label.startswith(start)
    )
    return next(found, None)


def _shape(case: Case) -> str:
    return " ".join(word for word in case.label.split() if "=" in word)


def _widths(case: Case) -> str:
    return " ".join(word for word in case.label.split() if "→" in word)


def _roofs(axis: Any, ceilings: dict[str, float], dtype: str) -> None:
    peak, copy = ceilings[f"gemm_{dtype}_gflops"], ceilings["copy_gbytes_per_s"]
    xs = (0.5, peak / copy, MOST)
    roof = (0.5 * copy, peak, peak)
    axis.plot(xs, roof, color=INK, lw=1.6, zorder=2)
    axis.fill_between(xs, roof, 1e4, color="#f3f5f7", zorder=1)
    axis.text(0.95 * MOST, peak * 1.06, f"GEMM {peak:.0f} GF/s", ha="right", va="bottom", size=8.5)
    axis.text(1.7, 1.6 * copy, f" copy {copy:.0f} GB/s", ha="left", va="top", size=8.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(0.5, MOST)
    most = max(1000.0, *(2 * value for name, value in ceilings.items() if name.startswith("gemm_")))
    axis.set_ylim(20, most)
    axis.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    ticks = [tick for tick in (30, 100, 300, 1000, 3000, 10000) if tick <= most]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.tick_params(length=0)
    axis.grid(color=FAINT, lw=0.7, zorder=1.5)
    axis.set_xlabel("FLOP per byte read or written once; the kernels of a shape are set a little apart")


def _roofline_legend(figure: Any, kernels: list[tuple[str, str]], shapes: list[str]) -> None:
    from matplotlib.lines import Line2D

    dots = [Line2D([], [], ls="", marker="o", ms=8, color=colour) for _, colour in dict.fromkeys(kernels)]
    names = [name for name, _ in dict.fromkeys(kernels)]
    marks = [Line2D([], [], ls="", marker=MARKERS[i % 4], ms=7, color=GREY) for i in range(len(shapes))]
    top = {"loc": "upper left", "handletextpad": 0.2, "columnspacing": 1.4}
    figure.legend(dots, names, bbox_to_anchor=(0.004, 0.94), ncols=len(names), **top)
    figure.legend(marks, shapes, bbox_to_anchor=(0.004, 0.89), ncols=len(shapes), **top)


# ------------------------------------------------------------------------------------------------------- grid

KINDS = {  # dtype and whether training: name, colour
    ("float32", False): ("forward, float32", OURS_COLOUR),
    ("float32", True): ("training step, float32", "#E69F00"),
    ("bfloat16", False): ("forward, bfloat16", "#56B4E9"),
    ("bfloat16", True): ("training step, bfloat16", "#D55E00"),
}


def grid(plt: Any, record: dict[str, Any], cases: list[Case]) -> Any:
    """Best alternative over ours at every point of the grid: sorted, and against the tokens."""
    chosen = [case for case in cases if case.section == "grid" and case.lead()]
    if len(chosen) < 8:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.4, 4.6), sharey=True)
    for number, (kind, (name, colour)) in enumerate(KINDS.items()):
        part = [case for case in chosen if (case.dtype, case.facts["train"]) == kind]
        if not part:
            continue
        leads = sorted(case.lead()["median"] for case in part)
        share = [100 * (number + 0.5) / len(leads) for number in range(len(leads))]
        label = f"{name}: {len(part)} cases, mean {mean_lead(part):.2f}"
        left.plot(share, leads, color=colour, marker="o", ms=3, lw=1.2, label=label)
        shift = 1.1 ** (number - 1.5)
        tokens = [case.facts["shape"]["tokens"] * shift for case in part]
        low, middle, high = ([case.lead()[key] for case in part] for key in ("low", "median", "high"))
        right.vlines(tokens, low, high, color=colour, lw=1, alpha=0.5)
        right.scatter(tokens, middle, s=16, color=colour, edgecolors="white", linewidths=0.4, zorder=3)
    mean, medians = mean_lead(chosen), [case.lead()["median"] for case in chosen]
    ticks = [t for t in (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 8, 15, 30, 60, 120) if t < max(9, *medians)]
    for axis in (left, right):
        axis.axhline(1, color=INK, lw=1.2, zorder=1)
        axis.axhline(mean, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
        axis.set_yscale("log")
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.tick_params(length=0)
        axis.grid(axis="y", color=FAINT, lw=0.7)
        axis.set_axisbelow(True)
    left.set_ylim(min(0.85, 0.95 * min(medians)), 1.15 * max(medians))  # a long interval is cut
    left.set_xlabel("% of the cases")
    left.set_ylabel("best alternative ÷ ours")
    left.set_title("every case, sorted")
    left.set_xlim(0, 100)
    left.text(99, mean * 0.98, f"geometric mean {mean:.2f}", ha="right", va="top", size=8.5)
    left.text(99, 0.985, "as fast as ours", ha="right", va="top", size=8.5)
    right.set_xscale("log", base=2)
    right.set_xticks([1, 8, 64, 512, 8192], ["1", "8", "64", "512", "8192"])
    right.set_xlabel("tokens T")
    right.set_title("against T, with the 95 % intervals")
    figure.legend(*left.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.004, 0.945), ncols=2)
    title(figure, "The best in plain PyTorch beside ours, over the grid")
    figure.tight_layout(rect=(0, 0.035, 1, 0.85), w_pad=2)
    return figure
