"""bfloat16 where AMX computes the mixture densely (csrc/lora/dense.h), and just beside; the router, too."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import assert_close, check_mixture, error, make_mixture, moa
from moa_ops import reference

BF16 = torch.bfloat16


@pytest.mark.parametrize("kind", ["random", "one", "holes", "none"])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "experts", "top_k", "r"),
    [
        (64, 64, 64, 4, 2, 16),  # one tile each way
        (63, 64, 64, 4, 2, 16),  # grouped: too few tokens
        (80, 131, 192, 3, 2, 17),  # odd columns, a rank beyond a tile
        (97, 514, 321, 8, 2, 16),  # in % 32 = 2; outputs that are no whole tiles, here and there
        (113, 32, 832, 8, 1, 7),  # odd ranks
        (301, 256, 128, 2, 2, 128),  # deep
        (70, 96, 256, 40, 4, 2),  # many small experts: shrink by groups, expand dense
        (150, 128, 192, 20, 2, 16),  # grouped, whole strips
        (600, 64, 64, 200, 3, 17),  # an odd rank beyond a tile; more than one block of tokens
        (40, 192, 64, 3, 2, 40),  # few tokens, strips
    ],
)
def test_dense_and_beside(
    isa: str, tokens: int, in_features: int, out_features: int, experts: int, top_k: int, r: int, kind: str
) -> None:
    sizes = (tokens, in_features, out_features, experts, top_k, r)
    check_mixture(make_mixture(*sizes, BF16, kind=kind, bias=True))


@pytest.mark.parametrize("experts", [6, 50])
def test_ranks_scales_and_far_rows(isa: str, experts: int) -> None:
    p = make_mixture(90, 160, 128, experts, 3, 12, BF16, None, "holes", ranks=True, expert_scaling=True)
    check_mixture(p)
    wide = torch.randn(90, 500).to(BF16)
    wide[:, 7:167] = p.x
    p.x = wide[:, 7:167]
    check_mixture(p)


@pytest.mark.parametrize("experts", [3, 24])
def test_one_token_twice_under_an_expert(isa: str, experts: int) -> None:
    p = make_mixture(96, 64, 64, experts, 2, 8, BF16)
    p.indices[::2, 1] = p.indices[::2, 0]
    p.expert_offsets, p.order = reference.sort_by_expert(p.indices, experts)
    check_mixture(p)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(isa: str, bad: float) -> None:
    """In an adapter: with the tokens that have chosen it. In a token: there."""
    p = make_mixture(200, 96, 128, 4, 2, 16, BF16)
    y, _ = p.forward()
    p.lora_A[1, 3], p.lora_B[2, 5] = bad, bad
    p.x[7, 1] = bad
    touched = (p.indices == 1).any(-1) | (p.indices == 2).any(-1)
    touched[7] = True
    now, h = p.forward()
    assert error(now[~touched], y[~touched]) < 1e-2  # an expert of those may take another path
    assert not now[(p.indices == 2).any(-1), 5].isfinite().any()
    dx = p.backward(h)[0]
    assert dx[~touched].isfinite().all()
    assert not now[7].isfinite().any()


@pytest.mark.parametrize(("tokens", "in_features", "experts"), [(32, 64, 3), (77, 515, 17), (300, 1000, 65)])
def test_router_logits_in_float32_accuracy(isa: str, tokens: int, in_features: int, experts: int) -> None:
    x = torch.randn(tokens, in_features + 9).to(BF16)[:, 2 : in_features + 2]
    weight = torch.randn(experts, in_features) * 10.0 ** torch.randint(-6, 4, (experts, 1))
    logits = moa.linear_routing(x, weight, 2, reference.SOFTMAX, True, None, None)[0]
    exact = x.double() @ weight.double().t()
    assert_close(logits, exact, "logits")
    for column in range(experts):
        assert error(logits[:, column], exact[:, column]) < 2e-6
    weight[1, 5] = math.inf
    x[:, 3] = 0.0
    logits = moa.linear_routing(x, weight, 1, reference.SOFTMAX, True, None, None)[0]
    finite = torch.arange(experts) != 1
    assert logits[:, finite].isfinite().all()
    assert not logits[x[:, 5] != 0, 1].isfinite().any()
