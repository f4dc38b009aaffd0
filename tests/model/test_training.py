"""Stage 1, stage 2 and joint training: what changes, what does not by a bit, and which losses say so."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import batch_of, mixture

from helpers import error
from moa_ops import MoAModel
from moa_ops.model import losses
from moa_ops.model.context import Decision
from moa_ops.routing import Routing


def tensors(model: MoAModel) -> dict[str, Tensor]:
    """Copies of every adapter's A and B by name, and of the routers."""
    found = {}
    for name in model.adapters:
        for path, factors in model.adapter_data(name).modules.items():
            found[f"{name}/{path}/A"], found[f"{name}/{path}/B"] = factors.A, factors.B
    return found | {f"router/{n}": p.detach().clone() for n, p in model.routers.named_parameters()}


def train(model: MoAModel, steps: int = 3, name: str = "llama", **arguments: object) -> None:
    """AdamW with momentum and much weight decay, as would move anything it holds."""
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.5)
    model.train()
    for step in range(steps):
        model(**batch_of(name, seed=step), **arguments).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """First parts of the names whose tensors differ in any bit."""
    assert before.keys() == after.keys()
    return {key.partition("/")[0] for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_each_adapter_alone_others_to_the_bit(name: str) -> None:
    model = mixture(name)
    for adapter in model.adapters:
        model.set_adapter(adapter)
        before, others = tensors(model), [a for a in model.adapters if a != adapter]
        train(model, name=name)
        assert changed(before, tensors(model)) == {adapter}
        rows = batch_of(name)
        model.set_adapter(None)
        assert torch.isfinite(model(**rows, adapter_names=others + [adapter]).loss)


def test_one_adapter_with_another_in_the_optimizer_before() -> None:
    """State of an earlier stage, whose momentum goes on pushing, does not reach the next adapter."""
    model = mixture()
    model.set_adapter("a")
    old = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.5)
    model(**batch_of("llama")).loss.backward()
    old.step()
    model.set_adapter("b")
    before = tensors(model)
    train(model)
    assert changed(before, tensors(model)) == {"b"}


def test_stage_1_gradients_equal_those_of_the_stack() -> None:
    model = mixture().train()
    batch, ids = batch_of("llama"), torch.ones(3, dtype=torch.int64)
    model.set_adapter("b")
    model(**batch).loss.backward()
    alone = {p: (layer.active_A.grad, layer.active_B.grad) for p, layer in model.layers.items()}
    model.set_adapter(None)
    model.set_trainable(experts=True, router=False)
    model(**batch, adapter_ids=ids).loss.backward()
    for path, layer in model.layers.items():
        r = layer.slots[1].r
        assert error(alone[path][0], layer.lora_A.grad[1]) < 1e-6
        assert error(alone[path][1], layer.lora_B.grad[1]) < 1e-6
        assert layer.lora_A.grad[[0, 2]].abs().sum() == 0
        assert layer.lora_A.grad[1, r:].abs().sum() == 0


def test_the_active_slice_survives_moves_and_copies() -> None:
    model = mixture()
    model.set_adapter("b")
    for _ in range(2):
        twin = copy.deepcopy(model).double()
        layer = next(iter(twin.layers.values()))
        assert layer is not next(iter(model.layers.values()))
        with torch.no_grad():
            layer.active_A.add_(1)
            layer.active_B.add_(1)
        assert torch.equal(layer.active_A, layer.lora_A[1])
        assert torch.equal(layer.active_B, layer.lora_B[1])
        assert layer.active_A.data_ptr() == layer.lora_A[1].data_ptr()
        model = twin.float()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert not any("active_" in key for key in state)
    train(model)
    assert any(not torch.equal(state[key], value) for key, value in model.state_dict().items())
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        layer = next(iter(model.layers.values()))
        assert torch.equal(layer.active_A, layer.lora_A[1])
        assert layer.active_A.data_ptr() == layer.lora_A[1].data_ptr()


def test_a_copy_can_be_unloaded_and_leaves_the_original_alone() -> None:
    model = mixture()
    expected = model(**batch_of("llama")).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch_of("llama")).logits, expected)
    twin.delete_adapter("a")
    base = twin.unload()
    assert type(base.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with model.disable_adapter(), torch.no_grad():
        plain = model(**batch_of("llama")).logits
    with torch.no_grad():
        assert torch.equal(base(**batch_of("llama")).logits, plain)
    assert torch.equal(model(**batch_of("llama")).logits, expected)


def test_the_optimizer_of_a_moved_model_still_reaches_the_stack() -> None:
    model = mixture()
    model.set_adapter("a")
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model.to(torch.float64)
    before = tensors(model)
    model(**batch_of("llama")).loss.backward()
    optimizer.step()
    assert changed(before, tensors(model)) == {"a"}


@pytest.mark.parametrize("mode", ["teacher_forced", "routed", "soft"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_stage_2_trains_routers_alone(mode: str, kind: str) -> None:
    model = mixture(router_type=kind)
    model.set_trainable(experts=False, router=True)
    before, ids = tensors(model), torch.tensor([2, 0, 1])
    first = model(**batch_of("llama"), domain_ids=ids).moa_losses["router"].item()
    train(model, steps=8, domain_ids=ids, routing_mode=mode)
    assert changed(before, tensors(model)) == {"router"}
    assert model(**batch_of("llama"), domain_ids=ids).moa_losses["router"].item() < first


def test_joint_training_changes_both() -> None:
    model = mixture(top_k=2, routing_level="token", router_aux_loss_coef=0.01, router_z_loss_coef=1e-3)
    model.set_trainable(experts=True, router=True)
    before = tensors(model)
    train(model)
    assert changed(before, tensors(model)) == {"a", "b", "c", "router"}


def test_by_id_in_training_reaches_those_adapters_alone() -> None:
    model = mixture().train()
    model.set_trainable(experts=True, router=False)
    model(**batch_of("llama"), adapter_names=["a", "__base__", "c"]).loss.backward()
    for path, layer in model.layers.items():
        assert [bool(g.abs().sum() > 0) for g in layer.lora_B.grad] == [True, False, True], path


def test_teacher_forcing_applies_the_labelled_expert() -> None:
    model, batch, ids = mixture(norm_topk_prob=True, top_k=2), batch_of("llama"), torch.tensor([2, 0, 1])
    forced = model(**batch, domain_ids=ids, routing_mode="teacher_forced")
    assert error(forced.logits, model(**batch, adapter_ids=ids).logits) < 1e-6
    model.update_routing(norm_topk_prob=False, top_k=1)
    forced = model(**batch, domain_ids=ids, routing_mode="teacher_forced")
    first = forced.moa_router_logits["model.layers.0"]
    with model.record_routing() as record:
        model(**batch, domain_ids=ids, routing_mode="teacher_forced")
    assert record.stats()["layers"]["model.layers.0"]["domain_expert"] == torch.eye(3).tolist()
    weight = first.softmax(-1)[0, 2]
    mean = record.stats()["layers"]["model.layers.0"]["mean_weight"][2]
    assert mean == pytest.approx(weight.item(), rel=1e-6)
    unlabelled = model(**batch, domain_ids=torch.tensor([-1, -1, -1]), routing_mode="teacher_forced")
    assert torch.equal(unlabelled.logits, model(**batch).logits)
    with pytest.raises(ValueError, match="needs domain_ids"):
        model(**batch, routing_mode="teacher_forced")


def test_gates_that_are_1_need_no_gradient_through_the_model() -> None:
    """Teacher-forced and renormalised, the routers learn from the labels alone: with top_k=1, where that is
    known beforehand, the model's part of the graph is not even recorded; the gradients are the same.
    """
    model, batch, ids = mixture(norm_topk_prob=True), batch_of("llama"), torch.tensor([2, 0, 1])
    model.set_trainable(experts=False, router=True)
    del batch["labels"]
    grads, recorded = [], []
    for top_k in (1, 2):
        model.update_routing(top_k=top_k)
        model.zero_grad()
        out = model(**batch, domain_ids=ids, routing_mode="teacher_forced")
        recorded.append(out.logits.requires_grad)
        out.loss.backward()
        grads.append([router.weight.grad for router in model.routers.values()])
    assert recorded == [False, True]
    for have, want in zip(*grads, strict=True):
        assert want.abs().sum() > 0
        assert torch.equal(have, want)


def decision(logits: Tensor, top_k: int = 1, mask: Tensor | None = None, rows: int = 0) -> Decision:
    from moa_ops import topk_routing

    return Decision("here", logits, topk_routing(logits, top_k, mask=mask), mask, rows)


def test_domain_loss_is_the_cross_entropy_of_what_counts() -> None:
    logits, mask = torch.randn(6, 4), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    ids = torch.tensor([3, -1])
    want = F.cross_entropy(logits[:2], torch.tensor([3, 3]))
    assert losses.domain_loss(decision(logits, mask=mask), ids).item() == pytest.approx(want.item())
    assert losses.domain_loss(decision(logits), torch.tensor([-1, -1])).item() == 0


def test_balance_loss_is_1_when_even_and_e_when_collapsed() -> None:
    even = torch.eye(4).repeat(3, 1) * 1e-4
    assert losses.balance_loss(decision(even), "softmax").item() == pytest.approx(1, abs=1e-3)
    one = torch.tensor([100.0, 0, 0, 0]).repeat(5, 1)
    assert losses.balance_loss(decision(one), "softmax").item() == pytest.approx(4)
    padded = torch.cat([one, -one])
    mask = torch.arange(10) < 5
    assert losses.balance_loss(decision(padded, mask=mask), "softmax").item() == pytest.approx(4)
    logits = torch.randn(7, 3)
    f = F.one_hot(logits.argmax(-1), 3).double().mean(0)
    scores = logits.double().sigmoid()
    want = 3 * (f * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    assert losses.balance_loss(decision(logits), "sigmoid").item() == pytest.approx(want.item(), rel=1e-5)


def test_z_loss_leaves_padding_out() -> None:
    logits, mask = torch.randn(5, 3), torch.tensor([1, 0, 1, 1, 0]).bool()
    want = logits[mask].logsumexp(-1).square().mean().item()
    assert losses.z_loss(decision(logits, mask=mask)).item() == pytest.approx(want)


def test_mutual_information_is_log_e_when_experts_mirror_domains() -> None:
    sharp = torch.eye(4) * 1e3
    ids = torch.arange(4)
    value = losses.mutual_information_loss(decision(sharp), ids, "softmax").item()
    assert value == pytest.approx(-math.log(4), rel=1e-5)
    same = losses.mutual_information_loss(decision(torch.zeros(4, 4)), ids, "softmax").item()
    assert same == pytest.approx(0, abs=1e-6)
    logits = torch.zeros(4, 4, requires_grad=True)
    losses.mutual_information_loss(decision(logits + torch.eye(4) * 0.1), ids, "softmax").backward()
    assert (logits.grad.diagonal() < 0).all()  # descent raises each domain's own expert


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_losses_do_not_depend_on_padding(level: str) -> None:
    coefs = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "router_mutual_information_coef": 0.3}
    model = mixture(routing_level=level, top_k=2, **coefs)
    ids, domain = torch.randint(2, 60, (2, 6)), torch.tensor([0, 2])
    parts = model(input_ids=ids, labels=ids, domain_ids=domain).moa_losses
    assert set(parts) == {"lm", "router", "balance", "z", "mutual_information"}
    padded = F.pad(ids, (0, 4))
    mask = F.pad(torch.ones_like(ids), (0, 4))
    labels = padded.masked_fill(mask == 0, -100)
    again = model(input_ids=padded, attention_mask=mask, labels=labels, domain_ids=domain).moa_losses
    for name, value in parts.items():
        assert again[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_a_loss_without_labels_is_the_routers() -> None:
    model, batch = mixture(), batch_of("llama")
    del batch["labels"]
    out = model(**batch, domain_ids=torch.tensor([0, 1, 2]))
    assert torch.equal(out.loss, out.moa_losses["router"])
    assert "lm" not in out.moa_losses


def test_configurations_that_cannot_train_the_router_warn() -> None:
    model = mixture(norm_topk_prob=True, top_k=1, router_domain_loss_coef=0.0)
    with pytest.warns(UserWarning, match="teaches the router nothing"):
        model.set_trainable(experts=False, router=True)
    model.update_routing(router_domain_loss_coef=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_trainable(experts=False, router=True)
        model(**batch_of("llama"), domain_ids=torch.tensor([0, 1, 2]))
    with pytest.warns(UserWarning, match="teaches the router nothing"):
        model(**batch_of("llama"))
    with pytest.warns(UserWarning, match="nothing to train"):
        model = mixture(router_type="prototype", router_granularity="module")
        model.set_trainable(experts=False, router=True)
    with pytest.warns(UserWarning, match="fewer than two"):
        mixture(adapters=("a",)).set_trainable(experts=False, router=True)


def test_top_1_renormalised_gives_its_router_no_gradient_and_the_others_do() -> None:
    """What the warning says, measured."""
    norms = {}
    for top_k, renormalised in ((1, True), (1, False), (2, True)):
        model = mixture(top_k=top_k, norm_topk_prob=renormalised, router_domain_loss_coef=0.0)
        for module in model.routers.values():
            module.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**batch_of("llama")).loss.backward()
        norms[top_k, renormalised] = sum(r.weight.grad.norm() for r in model.routers.values()).item()
    assert norms[1, True] < 1e-5 * min(norms[1, False], norms[2, True])


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = mixture()
    model.set_adapter("a")
    model.print_trainable_parameters()
    rank_4 = sum(4 * (layer.in_features + layer.out_features) for layer in model.layers.values())
    sizes = model.num_parameters_by_kind()
    assert sizes["trainable"] == rank_4
    assert sizes["adapters"] == 3 * rank_4
    assert f"trainable params: {rank_4:,} ||" in capsys.readouterr().out


def test_dropout_acts_in_training_only() -> None:
    model, batch = mixture(lora_dropout=0.5), batch_of("llama")
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_routing_of_a_decision_is_a_routing() -> None:
    assert isinstance(decision(torch.randn(3, 2)).routing, Routing)
