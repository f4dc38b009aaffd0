"""The statistics and the reports, on invented timings."""

from __future__ import annotations

import math
import random
import time

import pytest

from benchmarks import __main__ as command
from benchmarks import beside, machine, noise, options, readme, record, report, timer, verdict
from benchmarks.inputs import Shape
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
        spread, pairs = (vars(Spread.of([r * f for f in (0.999, 1.0, 1.001)])) for r in (ratio, ratio / ours))
        case.variants[name] = {"seconds": spread, "ratio": spread, "beside": pairs}
    case.variants["grouped_mm"] = {"absent": "not in this torch"}
    noise.state([case])
    return case


def test_spread_covers_the_median():
    spread = Spread.of([float(i) for i in range(101)])
    assert (spread.median, spread.q1, spread.q3, spread.least) == (50, 25, 75, 0)
    assert 38 < spread.low < 50 < spread.high < 62


def test_measure_pairs_every_function_with_the_baseline():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measure(functions, "a", beside="b", budget=0.01, min_rounds=3, max_rounds=3)
    assert timings["a"].ratio.median == 1 and timings["b"].rounds == 3
    assert timings["b"].beside.median == 1 and timings["a"].beside.median > 0
    assert set(calls) == {"a", "b"}


def test_measure_samples_what_is_far_slower_in_few_rounds(monkeypatch):
    monkeypatch.setattr(timer, "_calibrate", lambda function: 1e-2 if function is slow else 1e-3)
    calls = {"fast": 0, "slow": 0}

    def fast():
        calls["fast"] += 1

    def slow():
        calls["slow"] += 1

    functions = {"base": fast, "ours": fast, "slow": slow}
    timings = measure(functions, "base", beside="ours", budget=1.0, max_rounds=100)
    assert timings["ours"].rounds == 100 and timings["slow"].rounds == timer.OUTSIDER_ROUNDS
    assert timings["slow"].beside.median > 0
    assert calls["slow"] == 2 * timer.OUTSIDER_ROUNDS  # a warm-up before each


def test_few_rounds_spare_what_is_far_slower_too(monkeypatch):
    monkeypatch.setattr(timer, "_calibrate", lambda function: 2.0 if function is slow else 1.0)

    def slow():
        pass

    functions = {"base": lambda: None, "ours": lambda: None, "slow": slow}
    timings = measure(functions, "base", beside="ours", budget=1.0)
    assert timings["ours"].rounds == timer.MIN_ROUNDS and timings["slow"].rounds == timer.MIN_ROUNDS // 2
    assert timings["ours"].ratio.low <= timings["ours"].ratio.q1


def test_the_extremes_of_the_fewest_rounds_are_a_95_per_cent_interval():
    assert 1 - 2 * 0.5**timer.MIN_ROUNDS > 0.95 > 1 - 2 * 0.5 ** (timer.MIN_ROUNDS - 1)
    spread = Spread.of([float(n) for n in range(timer.MIN_ROUNDS)])
    assert (spread.low, spread.high) == (0, timer.MIN_ROUNDS - 1)


def test_measure_ends_though_all_is_slower_than_foreseen(monkeypatch):
    monkeypatch.setattr(timer, "_calibrate", lambda function: 1e-6)
    timings = measure({"a": lambda: time.sleep(2e-6)}, "a", budget=0.02, min_rounds=3, max_rounds=300)
    assert 3 <= timings["a"].rounds < 300


def test_losses_name_what_is_faster():
    (loss,) = record.losses([layer_case(1.2, 1.1)])
    assert loss.other == "loop" and loss.certain and loss.lead == pytest.approx(1.1 / 1.2)
    assert not list(record.losses([layer_case(1.08, 1.1)]))
    assert [x.other for x in record.losses([layer_case(1.08, 1.1)], to="one plain LoRA")] == [
        "one plain LoRA"
    ]
    text = verdict.verdict([layer_case(1.2, 1.1)], DOCUMENT)
    assert "- layer, T=1, float32: loop, 0.917 (0.889–0.946)\n" in text
    assert "1.200 > 1.100" in text and "1 under 0.97" in text


def test_a_loss_within_the_noise_says_so():
    case = layer_case(1.0, 0.99)
    assert "loop, 0.990 (0.961–1.020), within the noise" in verdict.verdict([case], DOCUMENT)


def test_the_floor_is_of_arithmetic_or_of_bytes():
    case = layer_case(1.2, 1.5)
    assert case.floor({}) == case.floor({"copy_gbytes_per_s": 1.0}) == 1.03
    case.facts["moved"] = 5e8
    assert case.floor({"copy_gbytes_per_s": 1.0}) == pytest.approx(1.5)
    assert case.floor({"copy_gbytes_per_s": 1000.0}) == 1.03


def visits_of(first: float, second: float, rounds: float = 0.0) -> list[list[float]]:
    """Two visits whose intervals by the rounds reach ``rounds`` standard deviations of 1."""
    reach = math.exp(noise.NORMAL * rounds)
    return [[median, median / reach, median * reach] for median in (first, second)]


def test_visits_say_what_is_between_them():
    """Of 100 pairs of visits 95 lie within what is found; what the rounds explain is not counted."""
    scatter = random.Random(0)
    for rounds in (0.0, 0.02):
        sigma = math.hypot(0.03, rounds)
        pairs = [visits_of(*(math.exp(scatter.gauss(0, sigma)) for _ in "ab"), rounds) for _ in range(2000)]
        assert noise.between(pairs) == pytest.approx(0.03, rel=0.1)
    assert noise.between([visits_of(1.0, 1.0)] * 30) == 0.0
    near = noise.between([visits_of(1.0, 1.02)] * 39 + [visits_of(1.0, 2.0)])  # the last is the outlier in 20
    assert near == pytest.approx(math.log(1.02) / 1.96 / 2**0.5, rel=0.01)
    far = noise.between([visits_of(2.0, 2.04)] * 40)
    assert far == pytest.approx(near / math.hypot(1, noise.EXTRA / 2), rel=0.02)


def test_a_spread_holds_what_is_between_the_visits():
    cases = [layer_case(1.0, 1.5) for _ in range(noise.ENOUGH)]
    for case in cases:
        del case.variants["loop"], case.variants["one plain LoRA"]
        case.variants[OURS]["ratio"]["visits"] = visits_of(1.04, 1 / 1.04)
    told = noise.state(cases)
    b = told["to the baseline, over 10 ms"]["between"]
    assert told["to the baseline, any"]["pairs"] == noise.ENOUGH
    assert b == pytest.approx(2 * math.log(1.04) / 1.96 / 2**0.5)
    values = cases[1].variants[OURS]["ratio"]
    assert values["high"] == pytest.approx(math.exp(1.96 * b)) and values["low"] == pytest.approx(
        math.exp(-1.96 * b)
    )
    assert noise.state(cases) == told and values["high"] == pytest.approx(math.exp(1.96 * b))


def test_a_spread_without_visits_is_that_of_what_is_known():
    """An older record, or a run of a few cases: the rounds, and what two visits differed by elsewhere."""
    loop = layer_case(1.1, 2.0).variants["loop"]["ratio"]
    reach = 1.96 * noise.UNKNOWN * math.hypot(1, noise.EXTRA / 2)
    assert loop["high"] == pytest.approx(2.0 * math.exp(math.hypot(reach, math.log(1.001))))
    assert loop["visits"] == [[2.0, pytest.approx(1.998), pytest.approx(2.002)]]


def test_changes_need_intervals_apart():
    pairs = list(noise.pairs([layer_case(1.08, 1.5)], [layer_case(1.1, 1.5)]))
    assert {pair.variant for pair in pairs} == {OURS, "loop", "one plain LoRA"}
    assert not any(pair.certain for pair in pairs) and all(pair.expected for pair in pairs)
    text = report.comparison(pairs)
    assert "0 of 1 points changed" in text and "100% of 2 figures, the others', agree within" in text
    pairs = list(noise.pairs([layer_case(1.08, 1.5)], [layer_case(1.2, 1.5)]))
    (change,) = (pair for pair in pairs if pair.certain)
    assert change.variant == OURS and change.factor == pytest.approx(1.2 / 1.08) and not change.expected
    text = report.comparison(pairs)
    assert "1 of 1 points changed" in text and " +11.1 %  1.080 -> 1.200  layer T=1 float32" in text
    assert "0% of 1 figures, ours, agree" in text
    assert report.comparison([]) == "The records have no point in common."


def test_two_runs_of_the_same_code_agree_as_often_as_stated():
    """Invented, with a scatter that a run keeps and one of each visit: 95 of 100 figures agree, or more."""
    scatter = random.Random(0)
    run_wide, visit_wide, rounds = 0.01, 0.02, 0.005

    def run() -> list[Case]:
        cases = [layer_case(1.1, 1.5) for _ in range(1000)]
        for number, case in enumerate(cases):
            case.label, shift = f"T={number}", scatter.gauss(0, run_wide)
            values = case.variants[OURS]["ratio"]
            medians = (1.1 * math.exp(scatter.gauss(shift, math.hypot(visit_wide, rounds))) for _ in "ab")
            values["visits"] = visits_of(*medians, rounds)
            values["median"] = math.prod(median for median, _, _ in values["visits"]) ** 0.5
        noise.state(cases)
        return cases

    changes = [change for change in noise.pairs(run(), run()) if change.variant == OURS]
    assert 0.95 < sum(change.expected for change in changes) / 1000 < 0.99
    assert sum(change.certain for change in changes) / 1000 < 0.015


def test_a_record_is_read_back_and_shown(tmp_path, capsys):
    paths = command.write(tmp_path / "2026-01-01.json", DOCUMENT, [layer_case(1.08, 1.5)])
    text = (tmp_path / "2026-01-01.md").read_text()
    assert text.count("T=1") == 3  # its row, slower than one plain LoRA, and the farthest from the floor
    document, cases = record.load(paths[0])
    assert document["commit"] == "0123456789" and cases[0].key == layer_case(1.08, 1.5).key
    assert cases[0].ratio(OURS) == 1.08 and cases[0].best_alternative() == ("loop", 1.5)
    command.main(["readme", str(paths[0])])
    shown = capsys.readouterr().out
    assert "| forward, T=1 | float32 | **1.08** | 1.03 | 1.05 | 1.50 (loop) |" in shown
    command.main(["compare", str(paths[0]), str(paths[0])])
    assert "0 of 1 points changed" in capsys.readouterr().out


def trials_of(labels: list[str], done: list[str], visits: int = 1) -> list[options.Trial]:
    def prepare(case: Case):
        done.append(case.label)
        return {BASE: lambda: None, OURS: lambda: None}

    cases = [Case("layer", label, "float32", BASE) for label in labels]
    return [options.Trial(case, lambda case=case: prepare(case), visits=visits) for case in cases]


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ((), [0, 1, 2, 3]),
        (("T=1",), [0, 2]),  # not T=16
        (("forward",), [0, 1]),
        (("T=16", "step"), [1, 2, 3]),
        (("T=16+step",), [3]),
        (("2/3",), [1]),
        (("1/3", "3/3"), [0, 2, 3]),
    ],
)
def test_points_are_words_parts_or_fractions(points, chosen):
    labels = ["T=1 E=8 forward", "T=16 E=8 forward", "T=1 E=8 step", "T=16 E=8 step"]
    found = options.Options(points=points).select(trials_of(labels, []))
    assert [trial.case.label for trial in found] == [labels[i] for i in chosen]


def test_what_the_library_takes_too_long_for_is_left_out_and_listed(monkeypatch):
    trials = trials_of(["a", "b"], [])
    trials[1].slow = 1.01 * options.TOO_SLOW
    chosen = options.Options()
    assert chosen.select(trials) == trials[:1]
    assert chosen.too_slow == [trials[1].case.key]
    text = verdict.verdict([layer_case(1.2, 1.5)], {"too_slow": ["layer b float32 warm"]})
    assert text.endswith("a call of nn.Linear takes over 0.6 s here:\n- layer b float32 warm")
    # 2·10⁹ operations: of 1 GF/s 2 s more for the gradient, of 100 nothing to speak of.
    shape, rates = Shape(1000, 1000, 1000, 8), {False: 10.0, True: 1.0}
    monkeypatch.setattr(beside, "library_rate", lambda dtype, gradient: rates[gradient])
    slow = {train: beside.trial("layer", shape, "bfloat16", train=train).slow for train in (False, True)}
    assert slow == {False: pytest.approx(0.2), True: pytest.approx(2.2)}
    rates[True] = 100.0
    assert beside.trial("layer", shape, "bfloat16", train=True).slow == pytest.approx(0.2)


def test_a_slow_bfloat16_has_the_ceiling_of_float32(monkeypatch):
    monkeypatch.setattr(machine, "library_rate", lambda dtype: 1.0 if dtype == "bfloat16" else 100.0)
    timed: list[str] = []
    spread = timer.Spread.of([1e-3])

    def measure(functions, baseline, budget):
        timed.extend(functions)
        return {name: timer.Timing(spread, spread, 1, 1) for name in functions}

    monkeypatch.setattr(machine, "measure", measure)
    found = machine.ceilings(1.0)
    assert timed[:4] == ["float32 1024", "float32 2048", "bfloat16 128", "copy"]
    assert found["gemm_bfloat16_gflops"] == found["gemm_float32_gflops"] == pytest.approx(2e-6 * 2048**3)


def test_a_run_stops_at_its_limit_and_goes_on(tmp_path):
    """What a first run measured is read from its file, not measured again."""
    done: list[str] = []
    path, document = tmp_path / "a.json", {**DOCUMENT, "ceilings": {"copy": 2.0}}
    first = options.Options(budget=0.001, points=("a",))
    first.keep = lambda: record.save(path, document, first.done.values())
    first.run(trials_of(["a", "b"], done))
    now = {**DOCUMENT, "settings": {}}
    second = options.Options(budget=0.001, done=record.resume(path, now))
    assert record.highest(now["ceilings"], {"copy": 1.0}) == {"copy": 2.0}
    cases = second.run(trials_of(["a", "b"], done))
    assert done == ["a", "b"] and [case.label for case in cases] == ["a", "b"]
    assert all(case.ratio(OURS) for case in cases)
    third = options.Options(limit=-1)
    assert third.run(trials_of(["a", "b"], done)) == [] and third.left == 2
    with pytest.raises(SystemExit, match="its commit is 0123456789"):
        record.resume(path, {**now, "commit": "another"})


def test_cases_are_visited_again_after_all_the_others(tmp_path):
    """Both visits count; a run that was ended between them is gone on with."""
    done: list[str] = []
    path, now = tmp_path / "a.json", {**DOCUMENT, "settings": {}}
    first = options.Options(budget=0.001)
    first.keep = lambda: record.save(path, DOCUMENT, first.done.values())
    first.run([*trials_of(["a", "b"], done, visits=2), *trials_of(["c"], done)])
    assert done == ["a", "b", "c", "a", "b"]
    second = options.Options(budget=0.001, done=record.resume(path, now))
    cases = second.run(trials_of(["a", "b", "c"], done, visits=2))
    assert done[5:] == ["c"] and [case.visits for case in cases] == [2, 2, 2]
    for case in cases:
        values = case.variants[OURS]["ratio"]
        assert len(values["visits"]) == 2
        assert values["median"] == pytest.approx(math.prod(v[0] for v in values["visits"]) ** 0.5, rel=1e-4)


def test_a_form_that_one_visit_left_out_or_compiled_otherwise_counts_once():
    def variants(of: str, ratio: float) -> dict[str, dict]:
        return {"compiled": {"of": of, "ratio": {"median": ratio}}}

    case = Case("grid", "a", "float32", BASE, variants=variants("loop", 1.5))
    case.join(variants("dense", 1.4))
    assert case.variants == variants("dense", 1.4)
    case.variants = {"compiled": {"absent": "slow"}}
    case.join(variants("dense", 1.4))
    assert case.variants == variants("dense", 1.4)
    case.join({"other": {"absent": "never"}})
    assert case.variants["other"] == {"absent": "never"}


def test_a_visit_of_which_the_median_alone_was_kept_joins_too():
    """A grid's record is short about what is far from the best; --resume may visit it a second time."""
    short = {"loop": {of: {"median": 8.0} for of in ("seconds", "ratio", "beside")}}
    for before, now in ((short, layer_case(1.0, 2.0).variants), (layer_case(1.0, 2.0).variants, short)):
        case = Case("grid", "a", "float32", BASE, variants=now)
        case.join(before)
        for of in ("seconds", "ratio", "beside"):
            assert case.variants["loop"][of] == {"median": pytest.approx(4.0)}
        noise.state([case])


def test_a_long_run_is_kept_now_and_then(monkeypatch):
    kept: list[int] = []
    run = options.Options(budget=0.001)
    run.keep = lambda: kept.append(len(run.done))
    run.run(trials_of(["a", "b", "c"], []))
    assert kept == [3]
    monkeypatch.setattr(options, "KEPT", 0)
    run.done.clear()
    run.run(trials_of(["a", "b"], []))
    assert kept == [3, 1, 2, 2]


def test_what_seems_lost_is_measured_again(monkeypatch):
    """For longer, and beside what came near alone."""
    asked: list[tuple[set[str], float]] = []

    def time(case: Case, functions, budget, min_rounds):
        asked.append((set(functions), budget))
        lead = 0.9 if len(asked) == 1 else 1.1
        case.variants.update(
            {
                name: {"ratio": {"median": ratio}, "beside": {"median": ratio}}
                for name, ratio in {BASE: 1, OURS: 1, "loop": lead, "slow": 5}.items()
                if name in functions
            }
        )

    monkeypatch.setattr(Case, "time", time)
    monkeypatch.setattr(options, "DISTURBED", 1000)
    case = Case("grid", "a", "float32", BASE)
    functions = dict.fromkeys((BASE, OURS, "loop", "slow"), lambda: None)
    (found,) = options.Options(budget=1).run([options.Trial(case, lambda: functions, sure=True, visits=1)])
    assert asked == [({BASE, OURS, "loop", "slow"}, 1), ({BASE, OURS, "loop"}, 4)]
    assert found.lead()["median"] == 1.1


def test_figures_are_written_between_the_markers(tmp_path):
    """Twice gives the same file; the grid adds its paragraph, and pictures that are there are shown."""
    grid = layer_case(1.2, 1.8)
    grid.section = "grid"
    for name, cases in (("a", [layer_case(1.08, 1.5)]), ("b", [grid])):
        record.save(tmp_path / f"{name}.json", DOCUMENT, cases)
    for picture in ("a.png", "a-scaling.png", "b-scaling.png"):
        (tmp_path / picture).touch()
    page, begin, end = tmp_path / "README.md", *readme.MARKERS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    words = ["readme", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--into", str(page)]
    command.main(words)
    text = page.read_text()
    command.main(words)
    assert page.read_text() == text
    assert text.startswith(f"before\n{begin}\n\n| r=16") and text.endswith(f"\n\n{end}\nafter\n")
    assert "**1.08**" in text and "![extra time over the plain layer](a.png)" in text and "old" not in text
    assert "(b-scaling.png)" in text and "a-scaling.png" not in text
    assert "On 1 of the 388 cases of a grid (" in text
    assert "takes 1.50 times as long as ours in the geometric mean (float32: forward 1.50), 1.50 at" in text
    assert "none of the cases are under 0.97" in text
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the lines"):
        command.main(words)


def test_a_whole_grid_is_called_one_and_its_parts_are_given_apart():
    cases = []
    for trial in command.SECTIONS["grid"](options.Options()):
        case, train = trial.case, trial.case.facts["train"]
        case.variants = layer_case(1.25, 2.5 if train else 2.0).variants
        if case.dtype == "bfloat16":
            case.variants = layer_case(1.25, 1.25).variants
        cases.append(case)
    assert "2 more, where `nn.Linear` alone takes over 0.6 s, are left out." in readme.whole_grid(
        {**DOCUMENT, "too_slow": ["a", "b"]}, cases[:-2], "a.json"
    )
    text = readme.whole_grid(DOCUMENT, cases, "a.json")
    assert "left out" not in text
    assert text.startswith("On a grid of 388 cases (T 1–8192,") and "float32 and bfloat16)" in text
    assert "(float32: forward 1.60, step 2.00; bfloat16: forward 1.00, step 1.00), 1.00 at the least" in text
    assert verdict.parts(cases) in verdict.verdict(cases, {**DOCUMENT, "ceilings": {"copy_gbytes_per_s": 40}})
    cases[0].variants["best, compiled"] = {**cases[0].variants["loop"], "of": "loop"}
    assert "On 387 of the 388 cases" in (text := readme.whole_grid(DOCUMENT, cases[:-1], "a.json"))
    assert "plain PyTorch, compiled too at 1 of them, takes" in text
    assert readme.whole_grid(DOCUMENT, [layer_case(1.2, 1.5)], "a.json") == ""


def test_the_farthest_from_the_floor_say_what_the_floor_explains():
    case = layer_case(1.3, 1.5)
    case.facts["moved"] = 4e9
    for of in case.variants.values():
        of.setdefault("seconds", {"median": 1.0})
    text = verdict.verdict([case], {"ceilings": {"copy_gbytes_per_s": 40.0}})
    assert "; of 300.000 ms extra, 10% are arithmetic, 33% bytes" in text


def test_a_verdict_as_markdown_parts_its_lists():
    assert command._list("a\nb:\n- c\n- d\ne:\n- f\ng: none") == "a\n\nb:\n\n- c\n- d\n\ne:\n\n- f\n\ng: none"


def test_the_readme_has_the_markers():
    text = (command.machine.ROOT / "README.md").read_text()
    assert [text.count(marker) for marker in readme.MARKERS] == [1, 1]
