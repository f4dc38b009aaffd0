"""record_routing: what was decided, counted by hand as well."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from zoo import batch_of, mixture

DOMAINS = torch.tensor([2, 0, 1])


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_counts_are_those_of_the_logits(level: str) -> None:
    model, batch = mixture(routing_level=level, top_k=2), batch_of("llama")
    with model.record_routing() as record:
        first = model(**batch, domain_ids=DOMAINS)
        model(**batch, domain_ids=DOMAINS)
    model(**batch)  # outside
    lengths = batch["attention_mask"].sum(1)
    assert list(record.stats()["layers"]) == ["model.layers.0", "model.layers.1"]
    for site, layer in record.stats()["layers"].items():
        logits = first.moa_router_logits[site].double()
        sizes = lengths.double() if level == "sequence" else batch["attention_mask"].flatten().double()
        rows = torch.arange(3) if level == "sequence" else torch.arange(3).repeat_interleave(7)
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(2)
        counts, total, by_domain = torch.zeros(3), torch.zeros(3), torch.zeros(3, 3)
        for n in range(len(logits)):
            for weight, expert in zip(weights[n], chosen[n], strict=True):
                counts[expert] += sizes[n]
                total[expert] += sizes[n] * weight
                by_domain[DOMAINS[rows[n]], expert] += sizes[n]
        assert layer["tokens_per_expert"] == (2 * counts).tolist()
        assert layer["share"] == pytest.approx((counts / counts.sum()).tolist())
        assert layer["largest_share"] == pytest.approx((counts / counts.sum()).max().item())
        assert layer["mean_weight"] == pytest.approx((total / counts.clamp(min=1)).tolist(), rel=1e-5)
        entropy = -(scores * scores.log()).sum(-1) @ sizes / sizes.sum() / math.log(3)
        assert layer["decision_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
        expected = by_domain / by_domain.sum(1, keepdim=True)
        assert torch.tensor(layer["domain_expert"]).sub(expected).abs().max() < 1e-6


def test_entropy_is_1_when_even_and_0_for_one() -> None:
    model = mixture(adapters=("a", "b"), top_k=None)
    with model.record_routing() as record:
        model(**batch_of("llama"))
    layer = record.stats()["layers"]["model.layers.0"]
    assert layer["entropy"] == pytest.approx(1)
    with torch.no_grad():
        for router in model.routers.values():
            router.weight.zero_()
    model.update_routing(top_k=1)
    with model.record_routing() as record:
        model(**batch_of("llama"))
    layer = record.stats()["layers"]["model.layers.0"]
    assert layer["entropy"] == pytest.approx(0, abs=1e-12)
    assert layer["largest_share"] == 1
    assert layer["decision_entropy"] == pytest.approx(1)


def test_a_generation_counts_its_prompt_once_at_sequence_level_and_every_token_at_token_level() -> None:
    ids = batch_of("llama")["input_ids"][:1]
    for level, expected in (("sequence", 7), ("token", 7 + 4)):
        model = mixture(routing_level=level)
        with model.record_routing() as record:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
        assert sum(record.stats()["layers"]["model.layers.0"]["tokens_per_expert"]) == expected


def test_checkpointing_counts_once() -> None:
    model = mixture().train()
    model.set_trainable(experts=True, router=True)
    records = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if kwargs:
            model.gradient_checkpointing_enable(kwargs)
        with model.record_routing() as record:
            model(**batch_of("llama")).loss.backward()
        records.append(record.stats())
    assert records[0] == records[1] == records[2]


def test_by_id_is_no_decision_and_adapters_must_not_change() -> None:
    model, batch = mixture(), batch_of("llama")
    with model.record_routing() as record:
        model(**batch, adapter_names=["a"] * 3)
        assert record.stats()["layers"] == {}
        model(**batch)
        model.add_adapter("d")
        with pytest.raises(RuntimeError, match="start another record"):
            model(**batch)


def test_a_static_router_is_recorded() -> None:
    model = mixture(router_type="static")
    with model.record_routing() as record:
        model(**batch_of("llama"))
    layer = record.stats()["layers"]["model.layers.0"]
    assert layer["mean_weight"] == pytest.approx([1 / 3] * 3)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = mixture()
    with model.record_routing() as record:
        with pytest.raises(ValueError, match="nothing was recorded"):
            record.plot(tmp_path / "empty.png")
        model(**batch_of("llama"), domain_ids=DOMAINS)
    record.plot(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
