"""torch.compile of whole models: one graph, the same numbers, by id and routed, also in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import batch_of, mixture, without_labels

from helpers import error
from moa_ops import MoAConfig, MoAModel, get_moa_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Layers(nn.Module):
    """A stack of residual blocks, nothing that could break a graph by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def layers(**config: object) -> MoAModel:
    torch.manual_seed(0)
    model = get_moa_model(Layers(), MoAConfig(r=4, target_modules="all-linear", num_experts=3, **config))
    with torch.no_grad():
        for parameter in (*model.routers.parameters(), *(x.lora_B for x in model.layers.values())):
            parameter.normal_()
    return model


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_routed_in_one_graph(backend: str, level: str) -> None:
    model = layers(routing_level=level, top_k=2)
    model.set_trainable(experts=True, router=True)
    x, results = torch.randn(2, 5, 16), []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        y = run(x)
        y.square().mean().backward()
        results.append((y.detach(), torch.cat([p.grad.flatten() for p in model.trainable_parameters()])))
    assert error(results[1][0], results[0][0]) < 1e-5
    assert error(results[1][1], results[0][1]) < 1e-5


def test_by_id_in_one_graph_for_any_ids() -> None:
    model, x = layers(), torch.randn(3, 5, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ids in ([0, 1, 2], [2, -1, 0], [-1, -1, -1]):
            ids = torch.tensor(ids)
            assert error(compiled(x, adapter_ids=ids), model(x, adapter_ids=ids)) < 1e-6


def test_one_adapter_in_one_graph() -> None:
    model, x = layers(), torch.randn(3, 5, 16)
    model.set_adapter("expert_1")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(compiled(x), model(x)) < 1e-6


def test_a_transformer() -> None:
    model, batch = mixture(), without_labels(batch_of("llama"))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(**batch).logits, model(**batch).logits) < 1e-5
        ids = torch.tensor([1, -1, 2])
        assert error(compiled(**batch, adapter_ids=ids).logits, model(**batch, adapter_ids=ids).logits) < 1e-5
