"""Which modules take adapters, what an unmatched name says, and a config that checks itself."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from zoo import batch_of, build, fill, mixture

from moa_ops import MoAConfig, get_moa_model
from moa_ops.model.targets import block_of, block_width, find_linears, matches

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def adapted(name: str = "llama", **config: object) -> set[str]:
    return set(get_moa_model(build(name), MoAConfig(r=2, **config)).layers)


def test_names_match_whole_parts_of_a_path() -> None:
    assert matches(Q0, ["q_proj"])
    assert matches(Q0, ["self_attn.q_proj"])
    assert matches(Q0, [Q0])
    assert not matches(Q0, ["proj", "attn.q_proj", "layers"])
    assert matches(Q0, r".*layers\.0.*q_proj")
    assert not matches(Q0, "q_proj")  # an expression covers all of a path
    assert not matches(Q0, None)


def test_what_is_chosen() -> None:
    per_layer = {"q_proj", "v_proj"}
    assert adapted(target_modules=["q_proj", "v_proj"]) == {
        f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in per_layer
    }
    assert adapted(target_modules=r".*\.1\.self_attn\.v_proj") == {V1}
    assert len(adapted(target_modules="all-linear")) == 14
    assert len(adapted(target_modules="all-linear", exclude_modules=["down_proj"])) == 12
    assert adapted(target_modules="all-linear", exclude_modules=r".*mlp.*|.*[kqo]_proj") == {
        V1.replace("1", "0"),
        V1,
    }
    assert "lm_head" not in adapted(target_modules="all-linear")
    assert adapted(target_modules=["lm_head"]) == {"lm_head"}
    assert "classifier" not in adapted("bert", target_modules="all-linear")
    assert "classifier" in adapted("bert", target_modules=["classifier"])


@pytest.mark.parametrize(
    ("targets", "near"),
    [
        (["q_prj"], "did you mean 'q_proj'"),
        (["query"], "linears are called"),
        ("q_proj", r"did you mean \['q_proj'\]"),
    ],
)
def test_a_name_without_a_match_is_an_error_with_near_ones(targets: object, near: str) -> None:
    base = build("llama")
    with pytest.raises(ValueError, match=near):
        get_moa_model(base, MoAConfig(target_modules=targets))
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear


def test_one_unmatched_name_among_good_ones_is_an_error() -> None:
    with pytest.raises(ValueError, match="matches 'wq'"):
        adapted(target_modules=["q_proj", "wq"])
    with pytest.raises(ValueError, match="it is a LlamaRMSNorm"):
        adapted(target_modules=["norm"])
    with pytest.raises(ValueError, match="leaves no linear"):
        adapted(target_modules=["q_proj"], exclude_modules=["self_attn.q_proj"])


@pytest.mark.parametrize(
    ("name", "path", "block", "width"),
    [
        ("llama", Q0, "model.layers.0", 32),
        ("gpt2", "transformer.h.1.mlp.c_proj", "transformer.h.1", 32),
        ("bert", "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0", 32),
        ("bert", "bert.pooler.dense", None, None),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k", "decoder.block.1", 32),
    ],
)
def test_blocks_are_the_outermost_repeated_modules(name, path, block, width) -> None:
    model = build(name)
    assert block_of(model, path) == block
    assert find_linears(model)[path].block == block
    if block:
        assert block_width(model, block) == width


def test_multihead_attention_is_left_alone() -> None:
    """Its output projection is never called, so an adapter in it would do nothing."""
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)).eval()
    model = get_moa_model(base, MoAConfig(r=2, target_modules="all-linear", num_experts=2))
    assert set(model.layers) == {"0.linear1", "0.linear2"}
    x = torch.randn(2, 3, 8)
    before = model(x)
    assert not torch.equal(fill(model)(x), before)


def test_linears_with_hooks_keep_them() -> None:
    base, calls = nn.Sequential(nn.Linear(4, 4)), []
    base[0].register_forward_hook(lambda *_: calls.append(1))
    model = get_moa_model(base, MoAConfig(r=2, target_modules="all-linear", num_experts=1))
    fill(model)(torch.randn(3, 4))
    assert calls == [1]


def test_quantised_linears_are_called() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base = build("llama")
    torchao.quantize_(base.model, torchao.Int8WeightOnlyConfig())
    batch = batch_of("llama")
    with torch.no_grad():
        expected = base(**batch).logits
        model = get_moa_model(base, MoAConfig(r=4, target_modules="all-linear", num_experts=2, top_k=2))
        assert torch.equal(model(**batch).logits, expected)
        fill(model)
        assert not torch.equal(model(**batch).logits, expected)
        assert torch.equal(model(**batch, adapter_names=["__base__"] * 3).logits, expected)
    model.set_trainable(experts=True, router=True)
    model(**batch, domain_ids=torch.tensor([0, 1, 0])).loss.backward()
    assert all(layer.lora_A.grad.abs().sum() > 0 for layer in model.layers.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number"),
        ({"r": 2.0}, "r must be a whole number"),
        ({"top_k": 0}, "top_k must be"),
        ({"num_experts": -1}, "num_experts"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"router_temperature": 0.0}, "router_temperature"),
        ({"router_temperature": float("nan")}, "router_temperature"),
        ({"routing_level": "batch"}, r"one of \['token', 'sequence'\]"),
        ({"router_granularity": "layer"}, "router_granularity"),
        ({"router_type": "linaer"}, "router_type"),
        ({"score_func": "tanh"}, "score_func"),
        ({"router_pooling": "first"}, "router_pooling"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"router_type": "prototype"}, "router_granularity='module'"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoAConfig(**settings)


def test_a_config_goes_through_json() -> None:
    config = MoAConfig(target_modules=["a", "b"], rank_pattern={"a": 3}, top_k=None, exclude_modules="x.*")
    again = MoAConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    with pytest.raises(ValueError, match="unknown settings"):
        MoAConfig.from_dict({**config.to_dict(), "surprise": 1})


def test_update_routing_changes_routing_only() -> None:
    model = mixture()
    model.update_routing(top_k=2, routing_level="token", norm_topk_prob=True, router_aux_loss_coef=0.01)
    assert model.moa_config.top_k == 2
    assert set(model(**batch_of("llama")).moa_losses) == {"lm", "balance"}
    for wrong in ({"r": 3}, {"router_type": "mlp"}, {"top_q": 1}):
        with pytest.raises(ValueError, match="cannot be changed"):
            model.update_routing(**wrong)
    with pytest.raises(ValueError, match="top_k must be"):
        model.update_routing(top_k=0)
    assert model.moa_config.top_k == 2
