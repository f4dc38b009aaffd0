"""Merged adapters against dense ΔW in float64, and against PEFT where PEFT is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import error
from moa_ops.model.adapter import LoraAdapter, LoraFactors
from moa_ops.model.merging import (
    COMBINATION_TYPES,
    concatenate,
    keep_largest,
    learn_weights,
    merge_adapters,
    merge_factors,
)

IN, OUT = 20, 24
WEIGHTS = [0.7, -0.4, 1.3]


def make_factors(dtype: torch.dtype = torch.float32) -> list[LoraFactors]:
    """Ranks 3, 8 and 5, different alphas, one with rsLoRA."""
    return [
        LoraFactors(torch.randn(r, IN).to(dtype), torch.randn(OUT, r).to(dtype), alpha, rslora)
        for r, alpha, rslora in [(3, 4.0, False), (8, 16.0, True), (5, 2.5, False)]
    ]


def dense(factors: list[LoraFactors]) -> list[Tensor]:
    """ΔW_i in float64, by the definition of the scaling."""
    return [
        f.lora_alpha / (f.A.shape[0] ** 0.5 if f.use_rslora else f.A.shape[0]) * f.B.double() @ f.A.double()
        for f in factors
    ]


def low_rank(delta: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def dense_top(delta: Tensor, density: float) -> Tensor:
    kept = delta.abs().flatten().argsort(descending=True)[: int(density * delta.numel())]
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[kept] = True
    return delta * mask.view_as(delta)


def dense_ties(deltas: list[Tensor], weights: list[float], method: str) -> Tensor:
    """Entry by entry, as the paper says it."""
    result = torch.zeros_like(deltas[0])
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            values = [float(delta[i, j]) for delta in deltas]
            votes = [(v > 0) - (v < 0) if method == "frequency" else v for v in values]
            sign = 1 if sum(votes) >= 0 else -1
            agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
            result[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


# ------------------------------------------------------------------------------------------- linear, cat, svd


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_sums_are_exact(kind: str) -> None:
    factors = make_factors()
    expected = sum(w * delta for w, delta in zip(WEIGHTS, dense(factors), strict=True))
    merged = merge_factors(factors, WEIGHTS, kind)
    assert merged.scaling == 1.0
    assert merged.r == 16
    assert error(merged.delta(torch.float64), expected) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
@pytest.mark.parametrize("kind", ["linear", "svd"])
def test_truncation_is_the_best_of_its_rank(kind: str, rank: int) -> None:
    factors = make_factors()
    total = sum(w * delta for w, delta in zip(WEIGHTS, dense(factors), strict=True))
    merged = merge_factors(factors, WEIGHTS, kind, svd_rank=rank)
    assert merged.r == rank
    assert error(merged.delta(torch.float64), low_rank(total, rank)) < 1e-6
    if rank >= 16:
        assert error(merged.delta(torch.float64), total) < 1e-6


def test_svd_has_the_largest_rank_by_default() -> None:
    factors = make_factors()
    assert merge_factors(factors, WEIGHTS, "svd").r == 8
    wide = [LoraFactors(torch.randn(30, IN), torch.randn(OUT, 30), 1.0)]
    assert merge_factors(wide, [1.0], "svd").r == IN
    assert error(merge_factors(wide, [1.0], "svd").delta(torch.float64), dense(wide)[0]) < 1e-6


def test_factors_are_balanced() -> None:
    """Neither side is large where the other is small: half precision would lose it."""
    small = LoraFactors(torch.randn(4, IN) * 1e-3, torch.randn(OUT, 4) * 1e3, 4.0)
    merged = merge_factors([small], [1.0], "svd")
    norms = merged.A.norm(dim=1), merged.B.norm(dim=0)
    assert torch.allclose(*norms, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    factors = make_factors(dtype)
    expected = sum(w * delta for w, delta in zip(WEIGHTS, dense(factors), strict=True))
    merged = merge_factors(factors, WEIGHTS)
    assert merged.A.dtype == merged.B.dtype == dtype
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}[dtype]
    assert error(merged.delta(torch.float64), expected) < limit


def test_no_dense_matrix_is_formed() -> None:
    """A layer whose ΔW would take 4 TB."""
    wide = [
        LoraFactors(torch.randn(2, 1_000_000).half(), torch.randn(1_000_000, 2).half(), 2.0) for _ in range(2)
    ]
    assert merge_factors(wide, [0.5, 0.5], "svd", svd_rank=3).A.shape == (3, 1_000_000)


def test_rank_beyond_what_is_there() -> None:
    """Rank 20 asked of a sum of rank 3: zeros fill the rest, and nothing is NaN."""
    factors = make_factors()[:1]
    merged = merge_factors(factors, [2.0], "svd", svd_rank=20)
    assert merged.r == 20
    assert error(merged.delta(torch.float64), 2 * dense(factors)[0]) < 1e-6
    zero = LoraFactors(torch.zeros(3, IN), torch.zeros(OUT, 3), 1.0)
    for kind in COMBINATION_TYPES:
        options = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
        assert merge_factors([zero, zero], [1.0, 1.0], kind, **options).delta().abs().max() == 0


# --------------------------------------------------------------------------------------------- entry by entry


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties(density: float, method: str) -> None:
    factors = make_factors()
    expected = dense_ties([dense_top(delta, density) for delta in dense(factors)], WEIGHTS, method)
    merged = merge_factors(
        factors, WEIGHTS, "ties", density=density, svd_rank=IN, majority_sign_method=method
    )
    assert error(merged.delta(torch.float64), expected) < 1e-5
    truncated = merge_factors(factors, WEIGHTS, "ties", density=density, majority_sign_method=method)
    assert truncated.r == 8
    assert error(truncated.delta(torch.float64), low_rank(expected, 8)) < 1e-5


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_magnitude_prune(density: float) -> None:
    factors = make_factors()
    expected = sum(w * dense_top(d, density) for w, d in zip(WEIGHTS, dense(factors), strict=True))
    merged = merge_factors(factors, WEIGHTS, "magnitude_prune", density=density, svd_rank=IN)
    assert error(merged.delta(torch.float64), expected) < 1e-5


def test_keep_largest() -> None:
    delta = torch.tensor([[3.0, -3.0, 1.0], [0.0, 3.0, -2.0]])
    assert keep_largest(delta, 1.0).equal(delta)
    assert keep_largest(delta, 0.34).equal(torch.tensor([[3.0, -3.0, 0.0], [0.0, 0.0, 0.0]]))
    assert keep_largest(delta, 0.67).equal(torch.tensor([[3.0, -3.0, 0.0], [0.0, 3.0, -2.0]]))
    assert keep_largest(delta, 0.01).abs().sum() == 0


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare(kind: str) -> None:
    """The mean over seeds tends to the value without dropping; one seed is one result."""
    factors = make_factors()
    options: dict[str, Any] = {"density": 0.5, "svd_rank": IN}
    one = merge_factors(factors, WEIGHTS, kind, **options, seed=1)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(merge_factors(factors, WEIGHTS, kind, **options, seed=1).A, one.A)
    assert not torch.equal(merge_factors(factors, WEIGHTS, kind, **options, seed=2).A, one.A)
    if kind == "dare_linear":
        expected = sum(w * delta for w, delta in zip(WEIGHTS, dense(factors), strict=True))
        seeds = 400
        mean = (
            sum(merge_factors(factors, WEIGHTS, kind, **options, seed=s).delta() for s in range(seeds))
            / seeds
        )
        spread = sum((w * delta) ** 2 for w, delta in zip(WEIGHTS, dense(factors), strict=True)).sum().sqrt()
        assert (mean - expected).norm() < 1.3 * spread / seeds**0.5
        single = LoraFactors(torch.ones(1, IN), torch.ones(OUT, 1), 1.0)
        values = merge_factors([single], [1.0], kind, **options).delta().round(decimals=3)
        assert set(values.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < (values > 0).float().mean() < 0.6


def test_dare_at_density_one_is_the_sum_and_ties() -> None:
    factors = make_factors()
    options: dict[str, Any] = {"density": 1.0, "svd_rank": IN}
    for dare, plain in [("dare_linear", "magnitude_prune"), ("dare_ties", "ties")]:
        expected = merge_factors(factors, WEIGHTS, plain, **options).delta(torch.float64)
        assert error(merge_factors(factors, WEIGHTS, dare, **options).delta(), expected) < 1e-5


# --------------------------------------------------------------------------------------------------- adapters


def test_layers_that_only_some_adapters_have() -> None:
    one, two, three = make_factors()
    adapters = [LoraAdapter({"a": one, "b": two}), LoraAdapter({"b": three, "c": one})]
    merged = merge_adapters(adapters, [0.5, 2.0])
    assert list(merged.modules) == ["a", "b", "c"]
    d_one, d_two, d_three = dense([one, two, three])
    assert error(merged.modules["a"].delta(), 0.5 * d_one) < 1e-6
    assert error(merged.modules["b"].delta(), 0.5 * d_two + 2.0 * d_three) < 1e-6
    assert error(merged.modules["c"].delta(), 2.0 * d_one) < 1e-6


def test_dare_draws_per_layer_whatever_the_order() -> None:
    one, two, _ = make_factors()
    options: dict[str, Any] = {"density": 0.5, "seed": 3}
    merged = merge_adapters([LoraAdapter({"a": one, "b": one})], [1.0], "dare_linear", **options)
    swapped = merge_adapters([LoraAdapter({"b": one, "c": two, "a": one})], [1.0], "dare_linear", **options)
    assert not torch.equal(merged.modules["a"].A, merged.modules["b"].A)
    for path in "ab":
        assert torch.equal(merged.modules[path].A, swapped.modules[path].A)


# ------------------------------------------------------------------------------------------------ beside PEFT


def peft_merged(adapters: list[LoraAdapter], weights: list[float], kind: str, **options: Any) -> Tensor:
    """ΔW of layer "0" as PEFT merges it, loaded from folders we wrote."""
    peft = pytest.importorskip("peft")
    from moa_ops.model.peft_format import write_peft_adapter

    folder: Path = options.pop("folder")
    for i, adapter in enumerate(adapters):
        write_peft_adapter(folder / str(i), adapter)
    base = nn.Sequential(nn.Linear(IN, OUT))
    model = peft.PeftModel.from_pretrained(base, folder / "0", adapter_name="0")
    for i in range(1, len(adapters)):
        model.load_adapter(folder / str(i), adapter_name=str(i))
    names = [str(i) for i in range(len(adapters))]
    model.base_model.add_weighted_adapter(names, weights, "mix", combination_type=kind, **options)
    return model.base_model.model[0].get_delta_weight("mix")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {}),
        ("svd", {"svd_rank": 6}),
        ("ties_svd", {"density": 0.4, "svd_rank": 20}),
        ("ties_svd", {"density": 0.4, "svd_rank": 20, "majority_sign_method": "frequency"}),
        ("magnitude_prune_svd", {"density": 0.4, "svd_rank": 9}),
    ],
)
def test_equals_peft_where_peft_works_on_the_whole_update(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    factors = [f for f in make_factors() if not f.use_rslora]
    adapters = [LoraAdapter({"0": f}) for f in factors]
    weights = [0.7, 1.3]
    theirs = peft_merged(adapters, weights, kind, folder=tmp_path, **options)
    ours = merge_adapters(adapters, weights, kind, **options).modules["0"].delta()
    assert error(ours, theirs) < 1e-5


def test_linear_has_no_cross_terms(tmp_path: Path) -> None:
    """PEFT adds up A and B apart, so its product has terms B_i A_j; the sum of the updates has none."""
    factors = [LoraFactors(torch.randn(4, IN), torch.randn(OUT, 4), 4.0) for _ in range(2)]
    adapters = [LoraAdapter({"0": f}) for f in factors]
    exact = sum(0.5 * delta for delta in dense(factors))
    theirs = peft_merged(adapters, [0.5, 0.5], "linear", folder=tmp_path)
    ours = merge_adapters(adapters, [0.5, 0.5], "linear").modules["0"].delta()
    assert error(theirs, exact) > 0.5
    assert error(ours, exact) < 1e-6


# -------------------------------------------------------------------------------------------- learned weights


def test_learned_weights_find_the_mixture() -> None:
    """The weights that made the target are found again from its outputs alone."""
    deltas = [delta.float() for delta in dense(make_factors())]
    x = torch.randn(64, IN)
    target = x @ sum(w * delta for w, delta in zip(WEIGHTS, deltas, strict=True)).T

    def loss(weights: Tensor) -> Tensor:
        assert weights.shape == (3,)
        return (
            (x @ sum(w * delta for w, delta in zip(weights, deltas, strict=True)).T - target).square().mean()
        )

    start = torch.full((3,), 1 / 3)
    found = learn_weights(loss, start, steps=300, lr=0.05)
    assert loss(found) < 1e-4 * loss(start)
    assert torch.allclose(found, torch.tensor(WEIGHTS), atol=0.02)
    assert not found.requires_grad
    assert torch.equal(learn_weights(loss, start, steps=20), learn_weights(loss, start, steps=20))
    sparse = learn_weights(loss, start, steps=300, lr=0.05, l1=1e4)
    assert sparse.abs().sum() < 0.2


def test_learned_weights_never_end_worse_than_they_began() -> None:
    best = torch.tensor([1.0, 2.0])
    found = learn_weights(lambda w: (w - best).abs().sum(), best, steps=5, lr=10.0)
    assert torch.equal(found, best)
    with pytest.raises(ValueError, match="does not depend on the weights"):
        learn_weights(lambda w: torch.tensor(1.0) * 0 + w.detach().sum(), [1.0])
    with pytest.raises(ValueError, match="the loss is nan"):
        learn_weights(lambda w: (w - 2).log().sum(), [1.0])


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0], {}, "one weight per adapter; got 3 adapters, 1 weights"),
        ([1.0, float("nan"), 1.0], {}, "weights must be finite"),
        (WEIGHTS, {"combination_type": "slerp"}, "combination_type must be one of"),
        (WEIGHTS, {"combination_type": "cat", "svd_rank": 4}, "cat keeps all ranks"),
        (WEIGHTS, {"combination_type": "svd", "svd_rank": 0}, r"svd_rank must lie in \[1, 20\]"),
        (WEIGHTS, {"combination_type": "svd", "svd_rank": 21}, r"svd_rank must lie in \[1, 20\]"),
        (WEIGHTS, {"combination_type": "ties"}, "ties needs density"),
        (WEIGHTS, {"combination_type": "dare_ties", "density": 0.0}, "needs density"),
        (WEIGHTS, {"combination_type": "dare_linear", "density": 1.5}, "needs density"),
        (WEIGHTS, {"combination_type": "linear", "density": 0.5}, "keeps every entry"),
        (WEIGHTS, {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "majority_sign"),
    ],
)
def test_bad_options(weights: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_factors(make_factors(), weights, **options)


def test_shapes_that_differ() -> None:
    other = LoraFactors(torch.randn(2, IN + 1), torch.randn(OUT, 2), 1.0)
    with pytest.raises(ValueError, match="different shapes"):
        merge_factors([make_factors()[0], other], [1.0, 1.0])
    with pytest.raises(ValueError, match="one weight per adapter"):
        merge_adapters([], [])


def test_concatenate_keeps_the_sign() -> None:
    factors = make_factors()[:1]
    A, B = concatenate(factors, [-2.0])
    assert error(B @ A, -2 * dense(factors)[0]) < 1e-6
