"""The figures of the README, generated from records and never typed: ``python -m benchmarks readme``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import gpu_record, grid, machine, record
from benchmarks.alternatives import COMPILED, PlainLora
from benchmarks.options import TOO_SLOW, Options
from benchmarks.record import OURS, Case
from benchmarks.report import Table
from benchmarks.verdict import BAR, mean_lead, parts

MARKERS = ("<!-- python -m benchmarks readme: begin -->", "<!-- python -m benchmarks readme: end -->")
PICTURES = {"": "extra time over the plain layer", "-scaling": "how the cost grows with T, E and r"}


def main(words: list[str]) -> None:
    """Prints the figures of the project's README, or writes them between its two markers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="file")
    parser.add_argument("--into", type=Path, help="a file with the markers, to be changed in place")
    args = parser.parse_args(words)
    found, pictures = [], {}
    for path in (path.resolve() for path in args.files):
        inside = path.is_relative_to(machine.ROOT)
        source = path.relative_to(machine.ROOT) if inside else Path(path.name)
        document, cases = record.load(path)
        builders = (cards,) if "steps" in document else (layers, whole_grid)
        found += [build(document, cases, source.as_posix()) for build in builders]
        for suffix, title in PICTURES.items():
            picture = f"{path.stem}{suffix}.png"
            if path.with_name(picture).exists():  # of two alike the later: the grid has more points
                pictures[title] = f"![{title}]({source.with_name(picture).as_posix()})"
    found += pictures.values()
    text = "\n\n".join(filter(None, found))
    if args.into is None:
        print(text)
        return
    before, begin, rest = args.into.read_text().partition(f"{MARKERS[0]}\n")
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise SystemExit(f"{args.into} lacks the lines {' and '.join(MARKERS)}")
    args.into.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def layers(record: dict[str, Any], cases: list[Case], source: str) -> str:
    """The table of layers, each beside the best form in plain PyTorch."""
    rows = []
    for section, what in (("layer", "forward"), ("training", "training step")):
        for case in cases:
            if case.section != section or case.cache != "warm":
                continue
            best = case.best_alternative()
            plain = case.ratio(PlainLora.name)
            rows.append(
                [
                    f"{what}, {case.label}",
                    case.dtype,
                    f"**{case.ratio(OURS):.2f}**",
                    f"{case.facts['floor']:.2f}",
                    f"{plain:.2f}" if plain else "–",
                    f"{best[1]:.2f} ({case.called(best[0])})" if best else "–",
                ]
            )
    columns = ["r=16, top-2", "dtype", "MoALinear", "floor", PlainLora.name, "best in plain PyTorch"]
    table = Table("", columns, rows).markdown(heading="").strip()
    machine = record["machine"]
    zen = f", {machine['microarchitecture']}" if machine["microarchitecture"] else ""
    caption = (
        f"Time ÷ `nn.Linear` sharing the same weight, own router included; medians of paired samples. "
        f"{machine['cpu']}{zen}, {machine['threads']} threads, {machine['isa']}; torch "
        f"{record['versions']['torch']}; commit {record['commit']}, {record['date']}. From `{source}` by "
        f"`python -m benchmarks readme`."
    )
    return f"{table}\n\n{caption}" if rows else ""


def cards(record: dict[str, Any], cases: list[Case], source: str) -> str:
    """The table of a GPU check's record."""
    graph = "forward, CUDA graph"
    kinds = {
        "forward": "forward",
        "training": "training step",
        "decode": graph,
        gpu_record.GIVEN: f"{graph}, experts given",
    }
    rows = []
    for case in cases:
        ours, best = case.timed().get(OURS), case.best_alternative()
        if ours is None:
            continue
        time = gpu_record.micro(ours["seconds"]["median"])
        if case.section in kinds:
            plain = case.ratio(PlainLora.name)
            ratios = [f"**{case.ratio(OURS):.2f}**", f"{case.facts['floor']:.2f}"]
            ratios.append(f"{plain:.2f}" if plain else "–")
            ratios.append(f"{best[1]:.2f} ({case.called(best[0])})" if best else "–")
            rows.append([f"{kinds[case.section]}, {case.label}", case.dtype, time, *ratios])
        elif case.section == "routing":
            other = gpu_record.micro(case.variants["plain PyTorch"]["seconds"]["median"])
            rows.append(
                [f"routing, {case.label}", case.dtype, time, "", "", "", f"{other} (softmax, topk, sort)"]
            )
    columns = [
        "r=16, top-2",
        "dtype",
        "time",
        "÷ nn.Linear",
        "floor",
        PlainLora.name,
        "best in plain PyTorch",
    ]
    table = Table("", columns, rows).markdown(heading="").strip()
    machine, versions = record["machine"], record["versions"]
    caption = (
        f"Own router included, but where the experts are given; medians of CUDA events over rotated inputs, "
        f"L2 flushed; the floor counts bytes alone. {machine['name']}, driver {machine['driver']}; torch "
        f"{versions['torch']}; commit {record['commit']}, {record['date']}. From `{source}` by `python -m "
        f"benchmarks readme`."
    )
    return f"{table}\n\n{caption}" if rows else ""


def whole_grid(record: dict[str, Any], cases: list[Case], source: str) -> str:
    """A paragraph on the grid, if there is one; of a part of it, it says which part."""
    chosen = [case for case in cases if case.section == "grid" and case.lead()]
    if not chosen:
        return ""
    count, whole = len(chosen), sum(1 for _ in grid.trials(Options()))
    where = f"a grid of {whole} cases" if count == whole else f"{count} of the {whole} cases of a grid"
    dtypes = " and ".join(dict.fromkeys(case.dtype for case in chosen))
    leads = sorted(case.lead()["median"] for case in chosen)
    under = sum(lead < BAR for lead in leads)
    compiled = sum(case.ratio(COMPILED) is not None for case in chosen)
    beside = f", compiled too at {compiled} of them," if compiled else ""
    left_out = len(record.get("too_slow", ()))
    slow = f"{left_out} more, where `nn.Linear` alone takes over {TOO_SLOW} s, are left out. "
    return (
        f"On {where} (T 1–8192, E 2–256, r 4–128, k 1–4, widths 256–4096, forward and training step, "
        f"{dtypes}) the fastest form in plain PyTorch{beside} takes {mean_lead(chosen):.2f} times as long as "
        f"ours in the geometric mean ({parts(chosen)}), {leads[0]:.2f} at the least; "
        f"{under or 'none'} of the cases {'is' if under == 1 else 'are'} under {BAR}. "
        f"{slow if left_out else ''}"
        f"Commit {record['commit']}, {record['date']}; every case is in `{source}`."
    )
