"""The tables of a record: as text for the terminal, as Markdown for the record and the README."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.inputs import CACHE
from benchmarks.machine import DISTURBED
from benchmarks.noise import NORMAL, OF, Change
from benchmarks.record import BASE, GEMMS, NOT_OPPONENTS, OURS, PEFT, PLAIN, Case

LAYER_NOTE = (
    "Times relative to nn.Linear: medians of paired ratios, for ours with the 95 % interval. floor: 1 + "
    "extra arithmetic, or extra bytes at the rate of the copy if that is more; ours is under it where our "
    "product with the weight is faster than nn.Linear's. aim: what two cores should reach. best ÷ ours: the "
    "fastest PyTorch form over ours."
)


@dataclass
class Table:
    """Rows of text under columns; the first column is aligned left, the others right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def text(self) -> str:
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]

        def line(row: list[str]) -> str:
            first, *others = zip(row, widths, strict=True)
            return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        body = [self.title, rule, line(self.columns), rule, *map(line, self.rows), rule]
        return "\n".join([*body, self.note] if self.note else body)

    def markdown(self, heading: str = "## ") -> str:
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)]
        parts = [f"{heading}{self.title}\n", "\n".join(lines)]
        return "\n".join([*parts, f"\n{self.note}"] if self.note else parts)


def tables(record: dict[str, Any], cases: list[Case]) -> Iterator[Table]:
    """One per section that was run."""
    for section, build in SECTIONS.items():
        chosen = [case for case in cases if case.section == section]
        if chosen:
            table = build(chosen, record)
            if any(_mark(case) for case in chosen):
                table.note += f"\n*: other processes took more than {DISTURBED:.0f} % of the cores meanwhile."
            yield table


def header(record: dict[str, Any]) -> str:
    """What the figures belong to, and what their spreads mean."""
    machine, versions, ceilings = record["machine"], record["versions"], record.get("ceilings", {})
    zen = f" ({machine['microarchitecture']})" if machine["microarchitecture"] else ""
    commit = f"{record['commit'] or 'unknown'}{' with changes' if record['modified'] else ''}"
    lines = [
        f"{machine['cpu']}{zen}, {machine['cores']} cores, {machine['threads']} threads used, kernels for "
        f"{machine['isa']}",
        f"moa_ops {versions['moa_ops']} at commit {commit}, torch {versions['torch']}, Python "
        f"{versions['python']}, {record['date']}",
    ]
    if ceilings:
        lines.append(
            f"measured ceilings: GEMM {ceilings['gemm_float32_gflops']:.0f} GF/s float32, "
            f"{ceilings['gemm_bfloat16_gflops']:.0f} GF/s bfloat16; "
            f"copy {ceilings['copy_gbytes_per_s']:.1f} GB/s"
        )
    company = record.get("company", {})
    if company.get("others_percent") is not None:
        lines.append(
            f"meanwhile other processes took {company['others_percent']:.1f} % of the cores, "
            f"other guests of the host {company['steal_percent']:.1f} %"
        )
    if told := record.get("noise"):
        means = (
            f"{100 * NORMAL * told[f'{kind}, any']['between']:.1f} % {kind}"
            for kind in OF.values()
            if f"{kind}, any" in told
        )
        lines.append(
            f"stated spreads are 95 % intervals: what visits of a case minutes apart differ by, for a "
            f"ratio near 1 ±{', ±'.join(means)}, and what the rounds of each say (benchmarks/noise.py)"
        )
    return "\n".join(lines)


def comparison(pairs: list[Change], least: float = 0.01) -> str:
    """What ``python -m benchmarks compare`` prints: what of ours changed, and whether the others stayed."""
    ours = [pair for pair in pairs if pair.variant == OURS]
    if not ours:
        return "The records have no point in common."
    found = [pair for pair in ours if pair.certain and abs(pair.factor - 1) > least]
    lines = [f"{len(found)} of {len(ours)} points changed beyond their noise and by more than {least:.0%}."]
    for pair in sorted(found, key=lambda pair: pair.factor):
        where = " ".join(part for part in pair.key if part != "warm")
        before, after = pair.before["median"], pair.after["median"]
        lines.append(f"{100 * (pair.factor - 1):+6.1f} %  {before:.3f} -> {after:.3f}  {where}")
    for what, chosen in (("ours", ours), ("the others'", [p for p in pairs if p.variant != OURS])):
        if chosen:
            agree = sum(pair.expected for pair in chosen) / len(chosen)
            spread = statistics.median(pair.spread for pair in chosen)
            lines.append(
                f"{agree:.0%} of {len(chosen)} figures, {what}, agree within their stated spread (of one "
                f"code 95 % or more do); the median spread is ±{spread:.1%}."
            )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- one per section


def _beside_base(title: str) -> Callable[[list[Case], dict[str, Any]], Table]:
    def build(cases: list[Case], record: dict[str, Any]) -> Table:
        others = [name for name in _names(cases) if name not in (BASE, OURS)]
        rows = []
        for case in cases:
            aim, lead, floor = case.facts.get("aim"), case.lead(), case.floor(record.get("ceilings", {}))
            base, ours = case.variants[BASE]["seconds"]["median"], case.variants[OURS]["ratio"]
            rows.append(
                [
                    case.label,
                    case.dtype + (", cold" if case.cache == "cold" else ""),
                    f"{base * 1e3:.3f}",
                    f"{case.variants[OURS]['seconds']['median'] * 1e3:.3f}",
                    f"{ours['median']:.3f}",
                    f"{_interval(ours)}{_mark(case)}",
                    f"{aim:.3f}" if aim else "",
                    f"{floor:.3f}",
                    f"{ours['median'] / floor:.2f}",
                    *(_cell(case, name) for name in others),
                    f"{lead['median']:.2f}" if lead else "",
                ]
            )
        ours = ["ours ms", "÷ nn.Linear", "95 %", "aim", "floor", "÷ floor"]
        columns = ["", "dtype", "nn.Linear ms", *ours, *others, "best ÷ ours"]
        return Table(title, columns, rows, LAYER_NOTE)

    return build


def _points(title: str) -> Callable[[list[Case], dict[str, Any]], Table]:
    """Many points: ours, the floor, and every other form; both directions of a point under each other."""

    def build(cases: list[Case], record: dict[str, Any]) -> Table:
        others = [name for name in _names(cases) if name not in (BASE, OURS)]
        rows = []
        for case in cases:
            best, lead, floor = case.best_alternative(), case.lead(), case.floor(record.get("ceilings", {}))
            rows.append(
                [
                    case.label,
                    case.dtype,
                    f"{case.variants[BASE]['seconds']['median'] * 1e3:.3f}",
                    f"{case.variants[OURS]['seconds']['median'] * 1e3:.3f}{_mark(case)}",
                    f"{case.ratio(OURS):.3f}",
                    f"{floor:.3f}",
                    f"{case.ratio(OURS) / floor:.2f}",
                    *(_cell(case, name) for name in others),
                    case.called(best[0]) if best else "",
                    f"{lead['median']:.2f} ({_interval(lead, 2)})" if lead else "",
                ]
            )
        ours = ["ours ms", "÷ nn.Linear", "floor", "÷ floor"]
        columns = ["", "dtype", "nn.Linear ms", *ours, *others, "best", "best ÷ ours"]
        note = (
            f"r=16 and k=2 where nothing is said. {LAYER_NOTE} Its 95 % interval is in brackets. A form that "
            "took several times as long as the best one in its first calls is left out (–)."
        )
        return Table(title, columns, rows, note)

    return build


def _interval(values: dict[str, float], digits: int = 3) -> str:
    return f"{values['low']:.{digits}f}–{values['high']:.{digits}f}"


def _beside_floor(ratio: float, floor: float | None) -> list[str]:
    """The floor, and how many times it the ratio is; older records have none."""
    return [f"{floor:.3f}", f"{ratio / floor:.2f}"] if floor else ["", ""]


def _cell(case: Case, name: str) -> str:
    ratio = case.ratio(name)
    return "–" if ratio is None else f"{ratio:.2f}"


def _peft(cases: list[Case], record: dict[str, Any]) -> Table:
    rows = []
    for case in cases:
        if absent := case.variants[PEFT].get("absent"):
            return Table("Beside PEFT, one layer", ["way"], [[c.label] for c in cases], absent)
        ours, lead, floor = case.variants[OURS]["ratio"], case.lead(), case.facts.get("floor")
        rows.append(
            [
                case.label,
                case.dtype,
                f"{case.variants[BASE]['seconds']['median'] * 1e3:.3f}",
                f"{case.variants[OURS]['seconds']['median'] * 1e3:.3f}",
                f"{ours['median']:.3f}",
                f"{_interval(ours)}{_mark(case)}",
                *_beside_floor(ours["median"], floor),
                f"{case.ratio(PEFT):.3f}",
                f"{lead['median']:.2f} ({_interval(lead, 2)})",
            ]
        )
    note = (
        "Times relative to nn.Linear, with the 95 % interval; the same adapters and the same result "
        "(benchmarks/peft_layer.py). floor: 1 + extra arithmetic."
    )
    ours = ["ours ms", "÷ nn.Linear", "95 %", "floor", "÷ floor"]
    columns = ["way", "dtype", "nn.Linear ms", *ours, PEFT, "PEFT ÷ ours"]
    return Table("Beside PEFT, one layer", columns, rows, note)


def _kernels(title: str) -> Callable[[list[Case], dict[str, Any]], Table]:
    return lambda cases, record: _kernel_table(title, cases, record)


def _kernel_table(title: str, cases: list[Case], record: dict[str, Any]) -> Table:
    ceilings, rows = record["ceilings"], []
    for case in cases:
        ours, best, lead = case.variants[OURS]["seconds"]["median"], case.best_alternative(), case.lead()
        if case.baseline not in NOT_OPPONENTS:  # routing: its baseline is its only opponent
            best, lead = (case.baseline, 1.0), case.beside(case.baseline)
        flop, moved = 1e-9 * case.facts.get("flop", 0), 1e-9 * case.facts["bytes"]
        arithmetic = flop / ceilings[f"gemm_{case.dtype}_gflops"]
        traffic = moved / ceilings["copy_gbytes_per_s"] if 1e9 * moved > CACHE or not flop else 0.0
        floor = max(arithmetic, traffic)
        rows.append(
            [
                case.label,
                case.dtype,
                f"{ours * 1e6:.0f}{_mark(case)}",
                f"{flop / ours:.0f}" if flop else "",
                f"{moved / ours:.1f}",
                f"{floor * 1e6:.0f}",
                f"{ours / floor:.2f}",
                f"{1 / case.ratio(OURS):.2f}" if case.baseline == GEMMS else "",
                best[0] if best else "",
                f"{lead['median']:.2f} ({_interval(lead, 2)})" if lead else "",
            ]
        )
    columns = ["kernel", "dtype", "ours µs", "GF/s", "GB/s", "floor µs", "÷ floor", "GEMMs ÷ ours"]
    note = (
        "GF/s of the chosen experts' products; GB/s if everything were read and written once. floor: the "
        "products at the rate of a large GEMM in the same dtype or, if longer, the bytes at that of a "
        "large copy (what fits into the last cache is not counted, but where there are no products). "
        "GEMMs: products of the same FLOPs, nothing routed: a ceiling. best ÷ ours: the fastest form in "
        "plain PyTorch over ours, with the 95 % interval."
    )
    return Table(title, [*columns, "best", "best ÷ ours"], rows, note)


def _memory(cases: list[Case], record: dict[str, Any]) -> Table:
    names = [name for name in _names(cases) if any("bytes" in c.variants.get(name, {}) for c in cases)]
    rows = []
    for case in cases:
        cells = [case.variants[name].get("bytes") for name in names]
        aim = case.facts.get("aim")
        megabytes = [f"{value / 1e6:.1f}" if value is not None else "–" for value in cells]
        rows.append([case.label, case.dtype, *megabytes, f"{aim / 1e6:.1f}" if aim else ""])
    note = "MB kept alive by autograd for the backward of one layer; x and the parameters aside."
    return Table("Memory saved for backward", ["", "dtype", *names, "aim"], rows, note)


def _overhead(cases: list[Case], record: dict[str, Any]) -> Table:
    names = _names(cases)
    rows = []
    for case in cases:
        timed, lead = case.timed(), case.lead()
        cells = (f"{timed[n]['seconds']['median'] * 1e6:.1f}" if n in timed else "–" for n in names)
        rows.append([case.label, *cells, f"{case.ratio(OURS):.2f}", f"{lead['median']:.2f}" if lead else ""])
    note = (
        "µs per call, one token through 32→32, E=8, r=4: almost nothing but Python and dispatch, whose "
        "floor is nn.Linear's own. best ÷ ours: gather+bmm, the one that computes the same."
    )
    return Table("Overhead", ["", *names, "ours ÷ nn.Linear", "best ÷ ours"], rows, note)


def _model(cases: list[Case], record: dict[str, Any]) -> Table:
    others = [name for name in _names(cases) if name not in (PLAIN, OURS)]
    rows = []
    for case in cases:
        plain, ours = case.variants[PLAIN]["seconds"]["median"], case.variants[OURS]["ratio"]
        nearest = [name for name in others if case.ratio(name)][-1:]
        rows.append(
            [
                case.label,
                f"{plain * 1e3:.0f}",
                f"{case.variants[OURS]['seconds']['median'] * 1e3:.0f}",
                f"{ours['median']:.3f}",
                f"{_interval(ours)}{_mark(case)}",
                f"{case.facts['aim']:.2f}",
                *_beside_floor(ours["median"], case.facts.get("floor")),
                *(_cell(case, name) for name in others),
                f"{case.beside(nearest[0])['median']:.2f}" if nearest else "",
            ]
        )
    note = (
        "Times relative to the plain model: medians of paired ratios, for ours with the 95 % interval. "
        "Llama, 4 layers of 1024 (2816), float32, adapters of r=16 on all seven linears, one router per "
        "block; 4 rows of 128 tokens; decoding: 32 tokens of prompt and 16 more, one row. floor: 1 + "
        "arithmetic of adapters and routers over that of all linears; attention, norms and Python, which "
        "only bring it nearer to 1, are left out. PEFT ÷ ours: what of PEFT does most of the same (its "
        "mixed batch, Arrow, or one adapter, which does less: it routes nothing)."
    )
    ours = ["ours ms", "÷ plain", "95 %", "aim", "floor", "÷ floor"]
    return Table("Whole model", ["", "plain ms", *ours, *others, "PEFT ÷ ours"], rows, note)


def _startup(cases: list[Case], record: dict[str, Any]) -> Table:
    facts = {name: value for case in cases for name, value in case.facts.items()}
    rows = [
        ["import torch", f"{facts['torch']:.2f} s"],
        ["import moa_ops after it", f"{facts['moa_ops'] * 1e3:.0f} ms"],
    ]
    if "modules" in facts:
        beside = f"{facts['modules']}, {facts['foreign_modules']} of them not its own"
        rows.append(["modules that torch has not loaded", f"{beside} (torch: {facts['torch_modules']})"])
        rows.append(["the extension", f"{facts['bytes'] / 1e6:.1f} MB"])
    if "seconds" in facts:
        rows.append([f"build from nothing, CPU kernels, {facts['jobs']} jobs", f"{facts['seconds']:.0f} s"])
    return Table("Import and build", ["", ""], rows, "Medians over fresh interpreters, files in the cache.")


SECTIONS: dict[str, Callable[[list[Case], dict[str, Any]], Table]] = {
    "layer": _beside_base("Forward, no gradients"),
    "training": _beside_base("Training step: base frozen, gradients of x, router and adapters"),
    "decode": _beside_base("Decoding: few tokens, cold caches"),
    "scaling": _points("Scaling in T, E, r, k and width"),
    "grid": _points("Grid"),
    "routing": _kernels("Routing"),
    "shrink": _kernels("Shrink"),
    "expand": _kernels("Expand-combine"),
    "gram": _kernels("Gram, and the mixture's backward"),
    "popularity": _kernels("Popularity of experts"),
    "kernels": _kernels("Kernels"),  # what older records call all of these
    "peft": _peft,
    "memory": _memory,
    "overhead": _overhead,
    "model": _model,
    "startup": _startup,
    "import": _startup,  # as older records call it
}


def _names(cases: list[Case]) -> list[str]:
    """All variants, in the order in which they first appear, the base and ours first."""
    found = dict.fromkeys(name for case in cases for name in case.variants)
    first = [name for name in (BASE, OURS) if name in found]
    return [*first, *(name for name in found if name not in first)]


def _mark(case: Case) -> str:
    return " *" if case.facts.get("others_percent", 0) > DISTURBED else ""
