"""generate(): decided at the prompt, kept per row, the same with padding on either side, beams and by id."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import VOCAB, batch_of, mixture

from helpers import error
from moa_ops import MoAModel
from moa_ops.model import context
from moa_ops.model.generation import composite_generate, composite_logits

NEW = 6


def prompts(rows: int = 4, length: int = 7) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, S]``, rows of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
    mask = torch.arange(length) >= torch.tensor([0, 3, 1, 4])[:rows, None]
    return ids.masked_fill(~mask, 0), mask.long()


def generate(model: MoAModel, ids: Tensor, mask: Tensor, **arguments: object) -> Tensor:
    arguments = {"max_new_tokens": NEW, "do_sample": False, **arguments}
    return model.generate(input_ids=ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]


def one_by_one(model: MoAModel, ids: Tensor, mask: Tensor, **arguments: object) -> Tensor:
    """Every row alone, without padding."""
    rows = []
    for row in range(len(ids)):
        own = {k: v[row : row + 1] if isinstance(v, Tensor | list) else v for k, v in arguments.items()}
        alone = ids[row][mask[row].bool()][None]
        rows.append(generate(model, alone, torch.ones_like(alone), **own))
    return torch.cat(rows)


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("granularity", ["block", "module", "model"])
def test_padding_on_either_side_or_none_gives_the_same_text(
    level: str, pooling: str, granularity: str
) -> None:
    model = mixture(routing_level=level, router_pooling=pooling, router_granularity=granularity)
    ids, mask = prompts()
    alone = one_by_one(model, ids, mask)
    assert torch.equal(generate(model, ids, mask), alone)
    order = mask.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(generate(model, ids.gather(1, order), mask.gather(1, order)), alone)
    model.set_adapter("a")
    assert not torch.equal(generate(model, ids, mask), alone)


def test_the_cache_changes_nothing_and_the_prompt_decides() -> None:
    """With the cache, step by step, the logits are those of one pass whose routers read the prompt alone."""
    model = mixture()
    ids, mask = prompts(rows=2)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole = torch.cat([mask, torch.ones(2, NEW, dtype=torch.long)], 1)
    readable = torch.cat([mask, torch.zeros(2, NEW, dtype=torch.long)], 1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    again = model(
        input_ids=out.sequences, attention_mask=whole, routing_mask=readable, position_ids=positions
    ).logits
    expected = again[:, ids.shape[1] - 1 : -1]
    assert error(torch.stack(out.logits, 1), expected) < 1e-5
    without = generate(model, ids, mask, use_cache=False)
    assert torch.equal(without, out.sequences[:, ids.shape[1] :])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_beams_follow_their_prompt(name: str, level: str) -> None:
    model = mixture(name, routing_level=level, top_k=2)
    ids, mask = prompts()
    start = 0 if name == "t5" else ids.shape[1]
    together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, num_beams=3)[:, start:]
    for row in range(len(ids)):
        alone = ids[row][mask[row].bool()][None]
        start = 0 if name == "t5" else alone.shape[1]
        arguments = {"max_new_tokens": NEW, "num_beams": 3, "attention_mask": torch.ones_like(alone)}
        assert torch.equal(together[row : row + 1], model.generate(input_ids=alone, **arguments)[:, start:])


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}])
def test_by_id_one_adapter_per_prompt(arguments: dict[str, int]) -> None:
    model = mixture()
    ids, mask = prompts()
    names = ["b", "__base__", "a", "c"]
    together = generate(model, ids, mask, adapter_names=names, **arguments)
    assert torch.equal(together, one_by_one(model, ids, mask, adapter_names=names, **arguments))
    by_ids = generate(model, ids, mask, adapter_ids=torch.tensor([1, -1, 0, 2]), **arguments)
    assert torch.equal(by_ids, together)
    with model.disable_adapter():
        base = generate(model, ids, mask, **arguments)
    assert torch.equal(together[1], base[1])
    assert not torch.equal(together, base)


def test_sampling_and_several_sequences() -> None:
    model = mixture()
    ids, mask = prompts()
    arguments = {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
    torch.manual_seed(0)
    routed = generate(model, ids, mask, **arguments)
    assert routed.shape == (12, NEW)
    torch.manual_seed(0)
    assert torch.equal(generate(model, ids, mask, **arguments), routed)
    names = ["b", "__base__", "a", "c"]
    torch.manual_seed(0)
    by_name = generate(model, ids, mask, adapter_names=names, **arguments)
    torch.manual_seed(0)
    ids12, mask12 = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    repeated = [name for name in names for _ in range(3)]
    arguments["num_return_sequences"] = 1
    assert torch.equal(generate(model, ids12, mask12, adapter_names=repeated, **arguments), by_name)


def test_an_encoders_states_decide_for_its_decoder() -> None:
    """Of a decoder's one start token nothing could be told: other inputs, other decisions."""
    model = mixture("t5")
    ids, mask = prompts()
    with model.record_routing() as record:
        text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    decoder = record.stats()["layers"]["decoder.block.0"]
    assert sum(decoder["tokens_per_expert"]) == mask.sum()
    alone = [
        model.generate(
            input_ids=row[keep.bool()][None], max_new_tokens=NEW, do_sample=False,
            attention_mask=torch.ones(1, int(keep.sum()), dtype=torch.long),
        )
        for row, keep in zip(ids, mask, strict=True)
    ]  # fmt: skip
    assert torch.equal(text, torch.cat(alone))


def test_switching_takes_turns() -> None:
    """Without a cache every step is one pass over everything so far, with the adapter whose turn it is."""
    model = mixture()
    ids, mask = prompts(rows=1)
    with model.switch_adapters(["a", "b"]):
        text = generate(model, ids, mask, use_cache=False)
    for step in range(NEW):
        so_far = torch.cat([ids, text[:, :step]], 1)
        logits = model(input_ids=so_far, adapter_names=["ab"[step % 2]]).logits
        assert logits[0, -1].argmax() == text[0, step]
    logits = [model(input_ids=ids, adapter_names=[name]).logits for name in ("a", "a", "b", "b", "a")]
    with model.switch_adapters(["a", "b"], every=2):
        assert all(torch.equal(model(input_ids=ids).logits, expected) for expected in logits)
    with pytest.raises(ValueError, match="every >= 1"):
        model.switch_adapters(["a"], every=0)


def test_composite_is_the_mean_of_single_adapters() -> None:
    model = mixture()
    ids, mask = prompts()
    names = ["a", "c"]
    singles = [model(input_ids=ids, adapter_names=[name] * 4).logits for name in names]
    assert error(composite_logits(model, names, input_ids=ids), sum(singles) / 2) < 1e-6
    text = composite_generate(model, ids, names, attention_mask=mask, max_new_tokens=NEW)
    assert text.shape == (4, ids.shape[1] + NEW)
    for row in range(4):
        so_far = ids[row][mask[row].bool()][None]
        for step in range(NEW):
            both = [model(input_ids=so_far, adapter_names=[name]).logits[:, -1] for name in names]
            token = sum(logits.log_softmax(-1) for logits in both).argmax(-1)
            assert token == text[row, ids.shape[1] + step]
            so_far = torch.cat([so_far, token[None]], 1)
    same = composite_generate(model, ids, ["b", "b"], attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(same[:, ids.shape[1] :], generate(model, ids, mask, adapter_names=["b"] * 4))
    with pytest.raises(ValueError, match="greedy"):
        composite_generate(model, ids, names, do_sample=True)


def test_rows_must_fit() -> None:
    model = mixture()
    ids, mask = prompts()
    with pytest.raises(ValueError, match="over 3 rows"):
        generate(model, ids, mask, adapter_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="no adapter is called 'x'"):
        generate(model, ids, mask, adapter_names=["a", "b", "c", "x"])
    with pytest.raises(TypeError, match="one name per row"):
        generate(model, ids, mask, adapter_names="a")


def test_a_static_cache_gives_the_same_text() -> None:
    """There the steps get masks of another shape; the prompt's own is remembered."""
    model = mixture()
    ids, mask = prompts()
    assert torch.equal(generate(model, ids, mask, cache_implementation="static"), generate(model, ids, mask))


def test_a_block_that_runs_several_times_keeps_a_decision_for_each() -> None:
    model, batch = mixture("albert"), batch_of("albert")
    with torch.no_grad():
        expected = model(**batch)
        call = model._call(batch)
        call.kept = {}
        with context.use(call):
            first, again = model.base_model(**batch).logits, model.base_model(**batch).logits
    assert torch.equal(first, expected.logits)
    assert torch.equal(again, first)
    runs = [run for site, run in call.kept if site.endswith("albert_layer_groups.0")]
    assert runs == [0, 1]
