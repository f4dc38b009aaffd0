"""``python -m benchmarks``: run, ``compare a.json b.json``, ``readme FILE.json``."""

from __future__ import annotations

import argparse
import datetime
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    compiling,
    decode,
    expand_combine,
    gram,
    grid,
    layer,
    machine,
    memory,
    model,
    noise,
    overhead,
    peft_layer,
    plot,
    popularity,
    readme,
    record,
    report,
    routing,
    scaling,
    shrink,
    startup,
    training,
    verdict,
)
from benchmarks.inputs import DTYPES
from benchmarks.options import Options, Trial
from benchmarks.record import Case

SECTIONS: dict[str, Callable[[Options], Iterator[Trial]]] = {
    "layer": layer.trials,
    "training": training.trials,
    "decode": decode.trials,
    "scaling": scaling.trials,
    "routing": routing.trials,
    "shrink": shrink.trials,
    "expand": expand_combine.trials,
    "gram": gram.trials,
    "popularity": popularity.trials,
    "peft": peft_layer.trials,
    "memory": memory.trials,
    "overhead": overhead.trials,
    "startup": startup.trials,
    "model": model.trials,
    "grid": grid.trials,
}
DEFAULT = tuple(name for name in SECTIONS if name != "grid")  # the grid alone takes half an hour
FULL, QUICK = 4.0, 0.7  # seconds of timing per case
WITHIN = 540.0  # seconds after which a run of DEFAULT begins no case, which is promised to take ten minutes


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs what it asks for."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["compare"]:
        compare(words[1:])
    elif words[:1] == ["readme"]:
        readme.main(words[1:])
    else:
        run(words)


def run(words: list[str]) -> None:
    """Measures, prints the tables, and writes JSON, Markdown and plots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Kernels and layers beside nn.Linear, the alternatives in plain PyTorch, and the floor.",
        epilog="Also: python -m benchmarks compare OLD.json NEW.json; python -m benchmarks readme FILE.json",
    )
    parser.add_argument(
        "--quick", action="store_true", help="under two minutes instead of ten: fewer points, wider spreads"
    )
    parser.add_argument(
        "--only",
        default=",".join(DEFAULT),
        help=f"sections of {', '.join(SECTIONS)}, by comma (default: all but grid, half an hour)",
    )
    parser.add_argument(
        "--points",
        default="",
        help="parts of labels, by comma (T=16,E=64+step), or 2/8: the second eighth",
    )
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="by comma (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--budget", type=float, help=f"seconds of timing per case ({FULL:g}; quick {QUICK:g})"
    )
    parser.add_argument(
        "--limit",
        type=float,
        help=f"begin no case after so many seconds (default: none; {WITHIN:g} for all sections together)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what the file to be written already holds, measure the rest",
    )
    parser.add_argument("--build", action="store_true", help="startup: also a build from nothing, a minute")
    parser.add_argument("--out", type=Path, help="folder for the results (default: build/bench)")
    parser.add_argument(
        "--record", action="store_true", help="into benchmarks/results/<machine>, to be committed"
    )
    args = parser.parse_args(words)
    only, dtypes, points = (tuple(filter(None, s.split(","))) for s in (args.only, args.dtypes, args.points))
    for name, given, known in (("--only", only, SECTIONS), ("--dtypes", dtypes, DTYPES)):
        if not given or set(given) - set(known):
            parser.error(f"{name} takes {', '.join(known)}; got {', '.join(given) or 'nothing'}")
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")

    torch.set_num_threads(args.threads)
    company = machine.Company()
    budget = args.budget or (QUICK if args.quick else FULL)
    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **machine.commit(),
        "machine": machine.describe(args.threads),
        "versions": machine.versions(),
        "settings": {"quick": args.quick, "seconds_per_case": budget},
    }
    folder = args.out or machine.ROOT / "build" / "bench"
    if args.record:
        folder = args.out or machine.ROOT / "benchmarks" / "results" / document["machine"]["name"]
    path = folder / f"{document['date']}{'' if only == DEFAULT else '-' + '-'.join(only)}.json"
    limit = args.limit or (WITHIN if only == DEFAULT else math.inf)
    options = Options(args.quick, budget, dtypes, points, args.threads, limit, build=args.build)
    if args.resume:
        options.done = record.resume(path, document)
    document["ceilings"] = record.highest(document.get("ceilings"), machine.ceilings(min(budget, 4)))
    print(report.header(document), flush=True)

    options.keep = lambda: record.save(path, document, options.done.values())
    trials = [trial for section in only for trial in SECTIONS[section](options)]
    compiling.ahead(options, trials)
    options.run(trials)
    if options.too_slow:
        document["too_slow"] = [" ".join(key) for key in options.too_slow]
    order = {trial.case.key: number for number, trial in enumerate(trials)}
    cases = sorted(options.done.values(), key=lambda case: order.get(case.key, len(order)))
    document["noise"] = noise.state(cases)
    document["company"] = company.percent()
    seconds = time.perf_counter() - options.started
    document["settings"]["wall_seconds"] = round(seconds + document["settings"].get("wall_seconds", 0))
    for table in report.tables(document, cases):
        print(f"\n{table.text()}")
    print(f"\n{verdict.verdict(cases, document)}\n\n{report.header(document)}")
    for written in write(path, document, cases):
        print(f"wrote {written}")
    if options.left:
        print(f"{options.left} visits were not begun within {limit:g} s; --resume goes on with them")


def write(path: Path, document: dict[str, Any], cases: list[Case]) -> list[Path]:
    """``path``, and beside it the same as Markdown, and as pictures."""
    record.save(path, document, cases)
    pictures = plot.draw(document, cases, path)
    shown = "".join(f"![{title}]({picture.name})\n\n" for title, picture in pictures.items())
    body = "\n\n".join(table.markdown() for table in report.tables(document, cases))
    header = report.header(document).replace("\n", "  \n")
    text = f"# {document['machine']['name']}, {document['date']}\n\n{header}\n\n{shown}{body}"
    judged = _list(verdict.verdict(cases, document))
    path.with_suffix(".md").write_text(f"{text}\n\n## Verdict\n\n{judged}\n")
    return [path, path.with_suffix(".md"), *pictures.values()]


def compare(words: list[str]) -> None:
    """Prints which points of two records differ by more than their noise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args(words)
    (old, before), (new, after) = record.load(args.before), record.load(args.after)
    for key in ("cpu", "threads", "isa"):
        if old["machine"][key] != new["machine"][key]:
            print(f"note: {key} differs: {old['machine'][key]} and {new['machine'][key]}")
    print(report.comparison(list(noise.pairs(before, after))))


def _list(text: str) -> str:
    """Lines of text as Markdown: blank lines but between two items of a list."""
    return re.sub(r"(?<=:)\n(?=- )|\n(?!- )", "\n\n", text)


if __name__ == "__main__":
    main()
