"""What the benchmarks measure, without measuring: the grid's design, what is checked, inputs, pictures."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    alternatives,
    beside,
    compiling,
    gram,
    grid,
    kernels,
    peft_layer,
    pictures,
    plot,
    routing,
    scaling,
)
from benchmarks.__main__ import DEFAULT, SECTIONS
from benchmarks.alternatives import COMPILED
from benchmarks.inputs import DTYPES, POPULARITIES, Problem, Shape, relative_error
from benchmarks.options import Options, Trial
from benchmarks.record import BASE, GEMMS, OURS, PEFT, Case
from test_benchmarks import DOCUMENT, layer_case

SMALL = Shape(24, 64, 48, 6, r=8)


def prepare(trial: Trial) -> dict:
    with torch.set_grad_enabled(trial.grad):
        functions = trial.prepare()
        for function in functions.values():
            function()
    assert set(functions) <= set(trial.names)
    return functions


# ------------------------------------------------------------------------------------------------- the grid


def test_the_grid_covers_every_range_and_keeps_its_limits():
    points = grid.points()
    assert len(points) == len(set(points)) and 120 <= len(points) <= 200
    ranges = {"tokens": (1, 8192), "experts": (2, 256), "r": (4, 128), "top_k": (1, 4)}
    ranges |= {"in_features": (256, 4096), "out_features": (256, 4096)}
    for axis, (low, high) in ranges.items():
        values = [getattr(point, axis) for point in points]
        assert (min(values), max(values)) == (low, high)
    for point in points:
        assert point.top_k <= point.experts and point.r >= 4
        assert point.adapter_values <= grid.VALUES
        assert point.base_flop <= grid.FLOP or point == grid.LARGEST
    assert {t.case.facts["train"] for t in grid.trials(Options())} == {False, True}
    assert {t.case.dtype for t in grid.trials(Options())} == set(DTYPES)


def test_forms_near_the_best_are_compiled():
    seconds = {alternatives.Loop: 1.0, alternatives.DenseMasked: 2.0, alternatives.GroupedMM: 1.0}
    assert beside.worth_compiling(seconds) == [alternatives.DenseMasked]
    assert beside.worth_compiling({**seconds, alternatives.GatherBmm: 2.5}) == [*alternatives.COMPILABLE]
    assert beside.worth_compiling({**seconds, alternatives.DenseMasked: 4.0}) == []
    trials = list(grid.trials(Options()))
    assert len(trials) == 388 and 2 * sum(trial.compiled is not None for trial in trials) > 388
    for trial in trials:
        assert (COMPILED in trial.names) == (trial.compiled is not None)


@pytest.mark.parametrize("train", [False, True])
def test_what_is_compiled_ahead_is_compiled(train: bool, monkeypatch):
    """The forms near the best, each called; whatever fails is left to the run."""
    called: list[str] = []

    def compile(alternative, dynamic: bool):
        if isinstance(alternative, alternatives.DenseMasked):
            raise RuntimeError("no compiler")
        return lambda x: called.append(alternative.name) or alternative(x)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(beside, "COMPILED_GAINS", 1e9)
    assert compiling._compile((SMALL, "float32", train)) == 2 and called == ["gather+bmm"]


def test_the_sample_covers_every_axis_evenly():
    """Every value of an axis comes equally often, but for one; k and r may be lowered afterwards."""
    points = grid.sample()
    assert points == grid.sample() and len(points) == grid.SAMPLES
    for axis in ("experts", "in_features", "out_features"):
        counts = [sum(getattr(p, axis) == value for p in points) for value in grid.SAMPLED[axis]]
        assert max(counts) - min(counts) <= 1, axis


def test_a_shape_beyond_the_limits_is_lowered():
    assert grid.within(Shape(8192, 4096, 4096, 256, r=128)) == Shape(512, 4096, 4096, 256, r=32)
    assert grid.within(SMALL) == SMALL


def test_scaling_is_part_of_the_grid():
    for quick in (False, True):
        assert set(scaling.points(quick)) <= set(grid.points())


def test_labels_are_keys():
    """Two cases of one section never share a key: a run that is resumed would take one for the other."""
    for quick in (False, True):
        for section, trials in SECTIONS.items():
            keys = [trial.case.key for trial in trials(Options(quick=quick))]
            assert len(keys) == len(set(keys)) > 0, section
    assert "grid" not in DEFAULT


# ----------------------------------------------------------------------------------- what is checked, and how


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, top_k=1), replace(SMALL, tokens=1, top_k=6)])
def test_every_form_is_checked_against_float64(shape: Shape, train: bool, dtype: str, monkeypatch):
    monkeypatch.setattr(beside, "WORTH", 1e9)  # however busy the machine is
    trial = beside.trial("grid", shape, dtype, train=train)
    functions = prepare(trial)
    assert {BASE, OURS, "loop", "dense-masked", "grouped_mm", "gather+bmm"} <= set(functions)
    for name in set(functions) - {BASE, "one plain LoRA"}:
        assert 0 <= trial.case.variants[name]["error"] < 2e-2


@pytest.mark.parametrize("train", [False, True])
def test_a_wrong_form_is_not_timed(train: bool, monkeypatch):
    call = alternatives.Loop.__call__
    monkeypatch.setattr(alternatives.Loop, "__call__", lambda self, x: call(self, x * 1.001))
    with pytest.raises(ArithmeticError, match="loop, "):
        prepare(beside.trial("grid", SMALL, "float32", train=train))


def test_what_is_hopeless_is_not_timed(monkeypatch):
    monkeypatch.setattr(beside, "WORTH", 0)
    call = alternatives.Loop.__call__
    monkeypatch.setattr(alternatives.Loop, "__call__", lambda self, x: [call(self, x) for _ in range(99)][0])
    trial = beside.trial("grid", SMALL, "float32")
    assert "loop" not in prepare(trial)
    assert trial.case.variants["loop"]["absent"].endswith("× the best one's")


def test_what_is_hopeless_of_a_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(beside, "WORTH", 0)
    ours, other, slow = (lambda s=s: (time.sleep(s), (torch.ones(3),))[1] for s in (0, 0.002, 0.1))
    functions = {GEMMS: ours, OURS: ours, "grouped_mm": other, "dense-masked": slow}
    wanted = {0: torch.ones(3, dtype=torch.float64)}
    make = lambda problem: (dict(functions), wanted)  # noqa: E731
    trial = kernels.beside_gemms("shrink", "a", lambda: None, 1, 1, "float32", make)
    assert list(prepare(trial)) == [GEMMS, OURS, "grouped_mm"]
    assert trial.case.variants["dense-masked"]["absent"].endswith("× the best one's")


@pytest.mark.parametrize("tokens", [24, 1])  # with one, most experts have none
def test_expected_gradients_are_those_of_autograd(tokens: int):
    problem = Problem(replace(SMALL, tokens=tokens), torch.float32)
    x, a, b, router = (
        t.double().requires_grad_()
        for t in (problem.x, problem.lora_A, problem.lora_B, problem.router_weight)
    )
    top, indices = (x @ router.t()).topk(2)
    gates = torch.zeros(tokens, 6, dtype=torch.float64).scatter(1, indices, top.softmax(-1))
    h = torch.einsum("ti,eri->ter", x, a)
    y = torch.einsum("te,ter,eor->to", gates * problem.scaling, h, b) + x @ problem.weight.double().t()
    assert relative_error(problem.expected(), y) < 1e-13
    wanted = torch.autograd.grad(y, (x, a, b, router), problem.grad_y.double())
    for got, want in zip(problem.expected_gradients().values(), wanted, strict=True):
        assert relative_error(got, want) < 1e-13


def test_no_token_is_near_a_tie():
    problem = Problem(Shape(4096, 16, 16, 64, r=4, top_k=4), torch.float32)
    top = (problem.x.double() @ problem.router_weight.double().t()).topk(5).values
    assert top.diff(dim=1).abs().min() > 9e-5


def test_what_takes_too_much_is_left_out_and_says_why():
    problem = Problem(replace(SMALL, r=3), torch.float32)
    assert alternatives.GroupedMM.why_not(problem, False) == "takes multiples of 4 only"
    problem.shape = Shape(8192, 4096, 4096, 64)
    assert alternatives.DenseMasked.why_not(problem, True) is None
    problem.shape = Shape(8192, 4096, 4096, 256, r=128)
    assert alternatives.DenseMasked.why_not(problem, False) is None
    assert alternatives.DenseMasked.why_not(problem, True) == "needs 5.0 GB for h"
    assert alternatives.GatherBmm.why_not(problem, True) == "gathers too much"


def test_kernels_are_checked_too():
    trials = [
        kernels.mixture("shrink", "a", SMALL, "float32"),
        kernels.mixture("expand", "a", replace(SMALL, in_features=16), "bfloat16"),
        gram.gram(SMALL, "float32"),
        gram.backward("gram", "a", SMALL, "bfloat16", "zipf"),
    ]
    for trial in trials:
        assert set(prepare(trial)) == {OURS, GEMMS, "grouped_mm", "dense-masked"}
        assert all(values["error"] < 2e-2 for values in trial.case.variants.values())
        assert trial.case.facts["flop"] > 0 and trial.case.facts["bytes"] > 0
    for trial in (routing.topk(SMALL), routing.linear(SMALL, "bfloat16")):
        assert set(prepare(trial)) == {OURS, routing.PYTORCH}


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_ways_of_peft_give_what_ours_gives(monkeypatch):
    monkeypatch.setattr(peft_layer, "SHAPE", Shape(32, 64, 48, 8, r=4))
    for trial in peft_layer.trials(Options()):
        assert set(prepare(trial)) == {BASE, OURS, PEFT}
        assert trial.case.variants[OURS]["error"] < 2e-2


# ----------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularities(popularity: str):
    shape = Shape(600, 8, 8, 30, r=2, top_k=2)
    given = Problem(shape, torch.float32).routing(popularity)
    counts = given.expert_offsets.diff().tolist()
    assert sum(counts) == 1200 and (given.indices.sort(1).values.diff(dim=1) > 0).all()
    if popularity == "one hot":
        assert counts == [600, 600] + [0] * 28
    elif popularity == "all distinct":
        assert counts == [40] * 30
    elif popularity == "zipf":
        assert counts[0] > 3 * counts[5] > 3 * counts[29]
    else:
        assert max(counts) < 3 * min(counts)


def test_an_unknown_popularity_is_named():
    with pytest.raises(ValueError, match="got 'odd'"):
        Problem(SMALL, torch.float32).routing("odd")


# --------------------------------------------------------------------------------------------------- pictures


def invented() -> list[Case]:
    """Every case that a picture could show, each twice as slow in plain PyTorch as with us."""
    cases = []
    for section in ("layer", "training", "scaling", "shrink", "expand", "gram", "routing", "grid"):
        for trial in list(SECTIONS[section](Options()))[:120]:
            case, like = trial.case, layer_case(1.2, 2.4)
            case.variants = like.variants
            cases.append(case)
    return cases


def test_every_picture_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    ceilings = {"gemm_float32_gflops": 200.0, "gemm_bfloat16_gflops": 400.0, "copy_gbytes_per_s": 40.0}
    document = {**DOCUMENT, "ceilings": ceilings}
    drawn = plot.draw(document, invented(), tmp_path / "a.json")
    assert sorted(path.stem for path in drawn.values()) == [
        "a",
        "a-backends",
        "a-leads",
        "a-roofline",
        "a-scaling",
    ]
    for path in drawn.values():
        assert path.stat().st_size > 10_000 and path.with_suffix(".svg").stat().st_size > 10_000


def test_values_above_neighbouring_cut_bars_stand_at_two_heights():
    case = Case("layer", "a", "float32", BASE)
    ratios = {"a": 1.1, "b": 4.0, "c": 5.0, "d": 6.0, "e": 1.2, "f": 9.0}
    case.variants = {name: {"ratio": {"median": ratio}} for name, ratio in ratios.items()}
    assert pictures._raised(case, list(ratios)) == ["c"]
    assert pictures._raised(case, ["b", "c"]) == ["c"] and pictures._raised(case, ["e", "f"]) == []


def test_nothing_is_drawn_of_nothing(tmp_path: Path):
    assert plot.draw(DOCUMENT, [], tmp_path / "a.json") == {}
