"""The statistics and the reports, on invented timings."""

from __future__ import annotations

import pytest

from benchmarks import __main__ as command
from benchmarks import record, report
from benchmarks.record import BASE, OURS, Case
from benchmarks.timer import Spread, measure

DOCUMENT = {
    "date": "2026-01-01",
    "commit": "0123456789",
    "modified": False,
    "machine": {
        "cpu": "CPU",
        "microarchitecture": None,
        "cores": 2,
        "threads": 2,
        "isa": "avx2",
        "name": "cpu",
    },
    "settings": {"quick": True},
    "versions": {"moa_ops": "0", "torch": "2", "python": "3"},
}


def layer_case(ours: float, other: float) -> Case:
    case = Case(
        "layer", "T=1", "float32", BASE, yardsticks=["one plain LoRA"], facts={"floor": 1.03, "aim": 1.1}
    )
    for name, ratio in {BASE: 1.0, OURS: ours, "loop": other, "one plain LoRA": 1.05}.items():
        spread = Spread.of([ratio * factor for factor in (0.999, 1.0, 1.001)])
        case.variants[name] = {"seconds": vars(spread), "ratio": vars(spread)}
    case.variants["grouped_mm"] = {"absent": "not in this torch"}
    return case


def test_spread_covers_the_median():
    spread = Spread.of([float(i) for i in range(101)])
    assert (spread.median, spread.q1, spread.q3, spread.least) == (50, 25, 75, 0)
    assert 38 < spread.low < 50 < spread.high < 62


def test_measure_pairs_every_function_with_the_baseline():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measure(functions, "a", budget=0.01, min_rounds=3, max_rounds=3)
    assert timings["a"].ratio.median == 1 and timings["b"].rounds == 3
    assert set(calls) == {"a", "b"}


def test_losses_name_what_is_faster():
    (loss,) = record.losses([layer_case(1.2, 1.1)])
    assert loss.other == "loop" and loss.certain and loss.factor == pytest.approx(1.2 / 1.1)
    assert not list(record.losses([layer_case(1.08, 1.1)]))
    assert [x.other for x in record.losses([layer_case(1.08, 1.1)], to="one plain LoRA")] == [
        "one plain LoRA"
    ]
    text = report.verdict([layer_case(1.2, 1.1)])
    assert "1.091 × loop" in text and "1.200 > 1.100" in text


def test_changes_need_intervals_apart():
    assert record.changes([layer_case(1.08, 1.5)], [layer_case(1.081, 1.5)]) == ([], 1)
    (change,), compared = record.changes([layer_case(1.08, 1.5)], [layer_case(1.2, 1.5)])
    assert compared == 1 and (change.before, change.after) == (1.08, 1.2)


def test_a_record_is_read_back_and_shown(tmp_path, capsys):
    paths = command.write(tmp_path, DOCUMENT, [layer_case(1.08, 1.5)])
    text = (tmp_path / "2026-01-01.md").read_text()
    assert text.count("T=1") == 2  # its row, and slower than one plain LoRA
    document, cases = record.load(paths[0])
    assert document["commit"] == "0123456789" and cases[0].key == layer_case(1.08, 1.5).key
    assert cases[0].ratio(OURS) == 1.08 and cases[0].best_alternative() == ("loop", 1.5)
    command.main(["readme", str(paths[0])])
    shown = capsys.readouterr().out
    assert "| forward, T=1 | float32 | **1.08** | 1.03 | 1.05 | 1.50 (loop) |" in shown
    command.main(["compare", str(paths[0]), str(paths[0])])
    assert "0 of 1 points changed" in capsys.readouterr().out
