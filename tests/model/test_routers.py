"""Who decides, from what, and how: against the same written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import batch_of, fill, mixture

from helpers import error
from moa_ops import MoAConfig, MoAModel, get_moa_model, topk_routing
from moa_ops.model import LoraFactors, context, deciding
from moa_ops.model.deciding import fitted, mean_inputs, pooled
from moa_ops.model.routers import prototype

FIRST = "model.layers.0"


def block_inputs(model: MoAModel, **batch: object) -> Tensor:
    """What the first block reads, ``[B, S, hidden]``."""
    seen = []
    handle = model.base_model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    handle.remove()
    return seen[0].double()


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("norm", [True, False])
def test_a_block_router_reads_its_blocks_pooled_input(pooling: str, norm: bool) -> None:
    batch = batch_of("llama")
    model = mixture(router_pooling=pooling, router_norm=norm, router_temperature=0.5)
    hidden, lengths = block_inputs(model, **batch), batch["attention_mask"].sum(1)
    if pooling == "mean":
        read = torch.stack([row[:n].mean(0) for row, n in zip(hidden, lengths, strict=True)])
    else:
        read = torch.stack([row[n - 1] for row, n in zip(hidden, lengths, strict=True)])
    weight = model.routers["model/layers/0"].weight.detach().double()
    expected = (unit(read) if norm else read) @ weight.t() / 0.5
    assert error(model(**batch).moa_router_logits[FIRST], expected) < 1e-5


def test_a_routing_mask_says_what_may_be_read() -> None:
    model, batch = mixture(), batch_of("llama")
    readable = torch.zeros(3, 7, dtype=torch.bool)
    readable[:, :3] = True
    short = {key: value[:, :3] for key, value in batch.items()}
    expected = model(**short).moa_router_logits[FIRST]
    assert error(model(**batch, routing_mask=readable).moa_router_logits[FIRST], expected) < 1e-5


def gates_of(model: MoAModel, **batch: object) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and weights and indices of the first block's decision."""
    call = model._call(batch)
    with torch.no_grad(), context.use(call):
        model.base_model(**batch)
    first = next(d for d in call.decisions if d.site == FIRST)
    return first.logits.double(), first.routing.weights.double(), first.routing.indices


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, None, 9])
def test_gates(score_func: str, renormalised: bool, top_k: int | None) -> None:
    model = mixture(score_func=score_func, norm_topk_prob=renormalised, top_k=top_k)
    logits, weights, indices = gates_of(model, **batch_of("llama"))
    scores = logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()
    k = min(top_k or 3, 3)
    expected, chosen = scores.topk(k)
    if renormalised:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(indices, chosen)
    assert error(weights, expected) < 1e-6


def test_routed_rows_are_weighted_sums_of_single_ones() -> None:
    """With one adapted linear at the end, the routed output is the gates' sum of those by id."""
    model = mixture(target_modules=["lm_head"], top_k=2, adapters=("a", "b", "c"))
    batch = {k: v for k, v in batch_of("llama").items() if k != "labels"}
    base = model(**batch, adapter_names=["__base__"] * 3).logits
    single = torch.stack([model(**batch, adapter_names=[n] * 3).logits - base for n in model.adapters])
    out = model(**batch)
    scores, chosen = out.moa_router_logits["lm_head"].softmax(-1).topk(2)
    for row in range(3):
        mixed = sum(w * single[e, row] for w, e in zip(scores[row], chosen[row], strict=True))
        assert error(out.logits[row], base[row] + mixed) < 1e-5


def test_soft_is_dense_and_not_renormalised() -> None:
    model = mixture(target_modules=["lm_head"])
    batch = batch_of("llama")
    base = model(**batch, adapter_names=["__base__"] * 3).logits
    single = torch.stack([model(**batch, adapter_names=[n] * 3).logits - base for n in model.adapters])
    out = model(**batch, routing_mode="soft")
    weights = out.moa_router_logits["lm_head"].softmax(-1)
    assert error(out.logits, base + torch.einsum("be,ebsv->bsv", weights, single)) < 1e-5


def test_a_prototype_is_the_direction_an_adapter_amplifies_most() -> None:
    A, B = torch.randn(3, 20), torch.randn(30, 3)
    v = prototype(LoraFactors(A, B, 1.0), 20)
    _, _, Vh = torch.linalg.svd(B.double() @ A.double())
    assert abs(abs(v.double() @ Vh[0]) - 1) < 1e-6
    assert prototype(LoraFactors(A, torch.zeros(30, 3), 1.0), 20).abs().sum() == 0
    assert prototype(None, 20).abs().sum() == 0


def test_prototypes_send_each_input_to_the_adapter_it_excites() -> None:
    config = MoAConfig(r=2, target_modules="all-linear", router_type="prototype", router_granularity="module",
                       routing_level="token", top_k=1, router_norm=False, num_experts=3)  # fmt: skip
    model = fill(get_moa_model(nn.Sequential(nn.Linear(16, 16)), config))
    layer = model.layers["0"]
    directions = torch.stack([prototype(layer.factors(e), 16) for e in range(3)])
    with model.record_routing() as record:
        model(-5 * directions[[2, 0, 1, 1]])
    assert record.stats()["layers"]["0"]["tokens_per_expert"] == [1, 2, 1]
    assert not model.trainable_parameters() or not any(p.requires_grad for p in model.routers.parameters())


def test_prototypes_follow_the_adapters() -> None:
    model = mixture(router_type="prototype", router_granularity="module", adapters=("a", "b"))
    path = f"{FIRST}.self_attn.q_proj"
    router, layer = model.routers[path.replace(".", "/")], model.layers[path]

    def up_to_date() -> bool:
        want = [prototype(layer.factors(e), 32) for e in range(layer.num_experts)]
        return torch.equal(router.weight, torch.stack(want))

    assert up_to_date()
    model.add_adapter("c")
    fill(model, seed=9)
    assert up_to_date()
    model.delete_adapter("a")
    assert up_to_date()
    model.set_adapter("c")
    with torch.no_grad():
        layer.active_B.normal_()
    assert not up_to_date()
    model.set_adapter(None)
    assert up_to_date()


def test_static_weights_are_a_fixed_or_learned_mixture() -> None:
    model = mixture(router_type="static", target_modules=["lm_head"])
    batch = batch_of("llama")
    base = model(**batch, adapter_names=["__base__"] * 3).logits
    single = torch.stack([model(**batch, adapter_names=[n] * 3).logits - base for n in model.adapters])
    assert error(model(**batch).logits, base + single.mean(0)) < 1e-5
    model.set_mixing_weights({"a": 2.0, "c": -0.5})
    assert error(model(**batch).logits, base + 2 * single[0] - 0.5 * single[2]) < 1e-5
    with pytest.raises(ValueError, match="no adapter is called 'd'"):
        model.set_mixing_weights({"d": 1.0})
    with pytest.raises(ValueError, match="only static routers"):
        mixture().set_mixing_weights({"a": 1.0})
    model.set_trainable(experts=False, router=True)
    model(**batch).loss.backward()
    assert model.routers["lm_head"].weight.grad.abs().min() > 0


def test_routers_start_from_examples() -> None:
    model = mixture(target_modules=["q_proj", "v_proj"])
    texts = {name: torch.randint(20 * e + 2, 20 * e + 18, (4, 9)) for e, name in enumerate(model.adapters)}
    model.init_routers({name: {"input_ids": ids} for name, ids in texts.items()}, margin=4.0)
    chosen, gaps = [], []
    for expert, ids in enumerate(texts.values()):
        for logits in model(input_ids=ids).moa_router_logits.values():
            chosen.append((logits.argmax(-1) == expert).float().mean())
            others = [e for e in range(3) if e != expert]
            gaps.append((logits[:, expert] - logits[:, others].mean(1)).mean())
    assert torch.stack(chosen).mean() > 0.9
    assert 2 < torch.stack(gaps).mean() < 6
    with pytest.raises(ValueError, match="must be given for all"):
        model.init_routers({"a": {"input_ids": texts["a"]}})
    with pytest.raises(ValueError, match="only linear routers"):
        mixture(router_type="mlp").init_routers({n: {"input_ids": i} for n, i in texts.items()})


def test_examples_are_read_padding_aside() -> None:
    model = mixture(routing_level="token")
    ids, means = torch.randint(2, 60, (2, 5)), []
    for pad in (0, 3):
        padded = nn.functional.pad(ids, (0, pad))
        mask = nn.functional.pad(torch.ones_like(ids), (0, pad))
        call = model._call({"attention_mask": mask})
        call.collect = True
        with torch.no_grad(), context.use(call):
            model.base_model(input_ids=padded, attention_mask=mask)
        means.append(mean_inputs(call.decisions, True))
    assert all(error(means[1][site], mean) < 1e-5 for site, mean in means[0].items())


def test_token_routing_leaves_padding_to_the_base() -> None:
    model, batch = mixture(routing_level="token", top_k=2), batch_of("llama")
    _, weights, indices = gates_of(model, **batch)
    padding = batch["attention_mask"].flatten() == 0
    assert (indices[padding] == -1).all()
    assert (weights[padding] == 0).all()
    assert (indices[~padding] >= 0).all()


def test_cross_attention_routes_the_encoders_tokens() -> None:
    """Also where encoder and decoder happen to have equally many tokens."""
    model = mixture("t5", routing_level="token")
    ids, mask = torch.randint(2, 60, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    call = model._call({"attention_mask": mask})
    with torch.no_grad(), context.use(call):
        model.base_model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    places = [d.site for d in call.decisions]
    assert places.count("decoder.block.0") == 2  # its own tokens, and those its keys and values see
    own, others = (d for d in call.decisions if d.site == "decoder.block.0")
    assert own.mask is None
    assert others.mask.tolist() == mask.flatten().bool().tolist()
    assert places.count("encoder.block.0") == 1


def test_pooling_and_masks() -> None:
    x, mask = torch.randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(pooled(x, mask, "last"), torch.stack([x[0, 1], x[1, 3], x[2, 3]]))
    expected = torch.stack([x[0, :2].mean(0), x[1, 2:].mean(0), torch.zeros(2)])
    assert error(pooled(x, mask, "mean"), expected) < 1e-6
    assert torch.equal(pooled(x, None, "last"), x[:, -1])
    long = torch.cat([torch.ones(3, 5).bool(), mask], 1)
    assert torch.equal(fitted(long, x), mask)  # a cache before these tokens
    assert torch.equal(fitted(mask[:1], x), mask[:1].repeat(3, 1))  # beams
    assert fitted(mask[:, :3], x) is None
    assert fitted(None, x) is None


def test_a_mask_is_fitted_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by every block; every step of a generation, whose mask grows, fits its own."""
    model, batch = mixture(routing_level="token", top_k=2), batch_of("llama")
    made: list[tuple[int, ...]] = []

    def counted(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        made.append(tuple(mask.shape))
        return fitted(mask, hidden)

    monkeypatch.setattr(deciding, "fitted", counted)
    rows, length = batch["attention_mask"].shape
    with torch.no_grad():
        model(**batch)
    assert len(model.routers) > 1
    assert made == [(rows, length)]
    made.clear()
    with torch.no_grad():
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made == [(rows, length + step) for step in range(3)]


def test_a_linear_router_decides_as_its_parts_do() -> None:
    """The one operator for logits and gates gives what the router module and ``topk_routing`` give."""
    model, batch = mixture(routing_level="token", top_k=2), batch_of("llama")
    call = model._call(batch | {})
    call.collect = True
    with torch.no_grad(), context.use(call):
        model.base_model(**batch)
    for decision in call.decisions:
        router = model.routers[decision.site.replace(".", "/")]
        x = decision.inputs
        logits = router(deciding.unit_mean_square(x) if model.routers.config.router_norm else x)
        assert error(decision.logits, logits) < 1e-6
        config = model.routers.config
        norm = {"score_func": config.score_func, "norm_topk_prob": config.norm_topk_prob}
        expected = topk_routing(decision.logits, 2, mask=decision.mask, **norm)
        assert torch.equal(decision.routing.indices, expected.indices)
        assert torch.equal(decision.routing.weights, expected.weights)


def test_a_linear_that_sees_other_tokens_says_so() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.first(x)[:, :2].flatten(0, 1)[:3]).sum()

    config = MoAConfig(r=2, target_modules="all-linear", num_experts=2, routing_level="token")
    model = get_moa_model(nn.Sequential(Block()), config)
    with pytest.raises(ValueError, match="sees other tokens than its block"):
        model(torch.randn(2, 5, 8))
    model = get_moa_model(nn.Sequential(Block()), MoAConfig(
        r=2, target_modules="all-linear", num_experts=2, routing_level="token", router_granularity="module"
    ))  # fmt: skip
    assert model(torch.randn(2, 5, 8)).shape == (2, 5, 8)


class Experts(nn.Module):
    """A block whose experts are linears of their own and get the tokens a router of its own gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        chosen, y = self.gate(rows).argmax(-1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = expert(rows[chosen == number])
        return x + y.view_as(x)


def test_experts_that_are_linears_route_their_own_tokens_or_are_an_error() -> None:
    torch.manual_seed(0)
    x, settings = torch.randn(2, 6, 8), {"r": 2, "num_experts": 2, "target_modules": "all-linear"}
    model = fill(get_moa_model(nn.Sequential(Experts()), MoAConfig(**settings)))
    for arguments in ({}, {"adapter_ids": torch.tensor([0, 1])}):
        with pytest.raises(ValueError, match="cannot be shared out over 2 rows"):
            model(x, **arguments)
    model.set_adapter("expert_1")  # one for all tokens needs no rows
    assert model(x).shape == x.shape
    by_token = {"routing_level": "token", "router_granularity": "module"}
    model = fill(get_moa_model(nn.Sequential(Experts()), MoAConfig(**settings, **by_token)))
    assert not torch.equal(model(x), nn.Sequential(Experts())(x))
    left_out = {**settings, "exclude_modules": r".*experts\.\d+"}
    model = fill(get_moa_model(nn.Sequential(Experts()), MoAConfig(**left_out)))
    assert model(x, adapter_ids=torch.tensor([0, 1])).shape == x.shape


def test_bad_arguments() -> None:
    model, batch = mixture(), batch_of("llama")
    with pytest.raises(ValueError, match="routing_mode must be one of"):
        model(**batch, routing_mode="hard")
    with pytest.raises(ValueError, match="not both"):
        model(**batch, adapter_names=["a"] * 3, adapter_ids=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no adapter is called 'd'"):
        model(**batch, adapter_names=["a", "d", "b"])


def test_positional_arguments_and_tuples() -> None:
    model, batch = mixture(), batch_of("llama")
    expected = model(**batch)
    again = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert torch.equal(again.logits, expected.logits)
    out = model(**batch, return_dict=False, domain_ids=torch.tensor([0, 1, 2]))
    labelled = model(**batch, domain_ids=torch.tensor([0, 1, 2]))
    assert torch.equal(out[0], labelled.loss)
    assert torch.equal(out[1], labelled.logits)
