"""How the demo shows itself: progress bars, the tables, and the plot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {  # key: (heading, legend, colour)
    "base": ("base", "base model", "#b8bec8"),
    "mixed": ("mixed", "one LoRA on mixed data", "#e0a458"),
    "oracle": ("oracle", "oracle: right adapter by id", "#7fb7be"),
    "moa": ("MoA", "MoA: routed", "#28536b"),
}


class Stages:
    """A progress bar per stage in a terminal, a line per stage elsewhere; keeps the seconds of each."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}
        self._bars = Progress(
            TextColumn("{task.description:<46}"),
            BarColumn(bar_width=28, complete_style="cyan"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Stages:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, name: str, steps: int = 1) -> Iterator:
        """Yields the function to call after every step, with a loss in bits per byte or nothing."""
        task = self._bars.add_task(name, total=steps, note="")
        start, note = time.perf_counter(), ""

        def advance(bits: float | None = None) -> None:
            nonlocal note
            note = "" if bits is None else f"{bits:.2f} bits/byte"
            self._bars.update(task, advance=1, note=note)

        yield advance
        self._bars.update(task, completed=steps)
        self.seconds[name] = time.perf_counter() - start
        if not self.console.is_terminal:
            self.console.print(f"{name:<46} {self.seconds[name]:6.1f} s  {note}", highlight=False)


def bits_table(bits: dict[str, dict[str, float]], accuracy: dict[str, float]) -> Table:
    """Bits per byte, one row per domain: ``bits[method][domain]``."""
    table = Table(
        title="bits per byte on held-out files (lower is better)", title_style="bold", header_style="bold"
    )
    table.add_column("domain", no_wrap=True)
    for method in ("unigram", *METHODS):
        table.add_column("unigram" if method == "unigram" else METHODS[method][0], justify="right")
    table.add_column("MoA-oracle", justify="right")
    table.add_column("routed", justify="right")
    domains = list(bits["base"])
    for domain in [*domains, "mean"]:
        values = {m: _mean(row) if domain == "mean" else row[domain] for m, row in bits.items()}
        right = _mean(accuracy) if domain == "mean" else accuracy[domain]
        table.add_row(
            domain,
            *[f"{values[m]:.3f}" for m in ("unigram", *METHODS)],
            f"{values['moa'] - values['oracle']:+.3f}",
            f"{right:.1%}",
            end_section=domain == domains[-1],
            style="bold" if domain == "mean" else None,
        )
    return table


def shares_table(shares: Tensor, domains: list[str], experts: list[str]) -> Table:
    """Share of each expert in the routers' choices, [domains, experts]."""
    table = Table(
        title="share of each expert, by the domain of the text", title_style="bold", header_style="bold"
    )
    table.add_column("text", no_wrap=True)
    for expert in experts:
        table.add_column(expert, justify="right")
    rows = {**dict(zip(domains, shares.tolist(), strict=True)), "all": shares.mean(0).tolist()}
    for domain, row in rows.items():
        table.add_row(
            domain,
            *[f"{share:.0%}" if share else "[dim]-[/dim]" for share in row],
            end_section=domain == domains[-1],
            style="bold" if domain == "all" else None,
        )
    return table


def print_samples(console: Console, samples: dict[str, dict[str, str]]) -> None:
    """Prompts and what the routed model writes after them."""
    console.print("\n[bold]samples[/bold] (prompt from held-out text dim; the routed model continues)")
    for domain, sample in samples.items():
        console.rule(f"[bold]{domain}[/bold], routed to [cyan]{sample['adapter']}[/cyan]", style="dim")
        console.print(sample["prompt"], end="", style="dim", markup=False, highlight=False)
        console.print(sample["text"], style="cyan", markup=False, highlight=False)


def plot(
    path: Path,
    bits: dict[str, dict[str, float]],
    errors: dict[str, dict[str, float]],
    shares: Tensor,
    matrix: Tensor,
    domains: list[str],
    experts: list[str],
) -> None:
    """Three panels: bits per byte by domain and method, expert share, and adapter x domain minus the base."""
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "figure.dpi": 150,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(11, 8.4), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.05))
        _bars(figure.add_subplot(grid[0, :]), bits, errors, domains)
        axes = figure.add_subplot(grid[1, 0])
        _heatmap(axes, shares, domains, experts, "Blues", 0, 1, "{:.0%}")
        axes.set_title("Which expert the routers chose")
        axes.set_ylabel("domain of the text")
        axes = figure.add_subplot(grid[1, 1])
        limit = 1.0  # bits; what lies beyond has the colour of the end
        _heatmap(axes, matrix, domains, experts, "RdBu", limit, -limit, "{:+.2f}")
        axes.set_title("Each adapter by id: bits per byte minus the base")
        figure.savefig(path)
        plt.close(figure)


def _bars(
    axes: plt.Axes, bits: dict[str, dict[str, float]], errors: dict[str, dict[str, float]], domains: list[str]
) -> None:
    width = 0.8 / len(METHODS)
    for number, (method, (_, name, colour)) in enumerate(METHODS.items()):
        places = [i + (number - (len(METHODS) - 1) / 2) * width for i in range(len(domains))]
        values = [bits[method][d] for d in domains]
        axes.bar(
            places,
            values,
            width * 0.92,
            label=name,
            color=colour,
            yerr=[errors[method][d] for d in domains],
            error_kw={"lw": 0.8, "ecolor": "#555555"},
        )
        for place, value in zip(places, values, strict=True):
            axes.text(
                place,
                0.06,
                f"{value:.2f}",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=8,
                color="white" if method == "moa" else "#222222",
            )
    axes.hlines(
        [bits["unigram"][d] for d in domains],
        [i - 0.42 for i in range(len(domains))],
        [i + 0.42 for i in range(len(domains))],
        color="#999999",
        ls=":",
        lw=1,
        label="byte frequencies alone",
    )
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("bits per byte")
    axes.set_title(
        "Held-out text, bytes after the prompt (lower is better; lines: standard error over windows)"
    )
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=9)


def _heatmap(
    axes: plt.Axes,
    values: Tensor,
    rows: list[str],
    columns: list[str],
    colours: str,
    low: float,
    high: float,
    text: str,
) -> None:
    low_is_high = low > high
    image = values.numpy()
    axes.imshow(
        image,
        cmap=f"{colours}_r" if low_is_high else colours,
        vmin=min(low, high),
        vmax=max(low, high),
        aspect="auto",
    )
    for i in range(len(rows)):
        for j in range(len(columns)):
            strong = abs(image[i, j]) > 0.6 * max(abs(low), abs(high))
            axes.text(
                j,
                i,
                text.format(image[i, j].round(2) + 0.0),  # no -0.00
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if strong else "#222222",
            )
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("adapter")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _mean(row: dict[str, float]) -> float:
    return sum(row.values()) / len(row)
