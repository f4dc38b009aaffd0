"""What a mixture may cost: one decision per block, one operator per linear, and hardly any memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from zoo import batch_of, mixture

import moa_ops
from moa_ops import MoAModel
from test_cost import CountCalls


def operators(model: MoAModel, **arguments: object) -> Counter[str]:
    """How often each of our operators runs in a forward without gradients."""
    batch = {k: v for k, v in batch_of("llama").items() if k != "labels"}
    with torch.no_grad(), CountCalls() as counter:
        model(**batch, **arguments)
    return Counter(name for name in counter.calls if name.startswith("moa_ops."))


DECISIONS = ("moa_ops.topk_routing.default", "moa_ops.linear_routing.default")
SORTS = "moa_ops.sort_by_expert.default"


@pytest.mark.parametrize("experts", [2, 30])
def test_one_decision_per_block_and_one_operator_per_linear(experts: int) -> None:
    names = tuple(f"e{n}" for n in range(experts))
    for level, granularity, decided, sorts in (
        ("token", "block", 2, 0),
        ("sequence", "block", 2, 2),  # a row's decision, given to its tokens
        ("sequence", "model", 1, 1),
        ("token", "module", 14, 0),
    ):
        model = mixture(adapters=names, routing_level=level, router_granularity=granularity, top_k=2)
        found = operators(model)
        assert sum(found[name] for name in DECISIONS) == decided, (level, granularity)
        assert found[SORTS] == sorts, (level, granularity)
        assert found.total() - decided - sorts == len(model.layers), (level, granularity)


def test_by_id_sorts_once_for_the_whole_model() -> None:
    model = mixture()
    found = operators(model, adapter_names=["a", "b", "c"])
    assert found[SORTS] == 1
    assert found.total() == 1 + len(model.layers)
    model.set_adapter("a")
    assert operators(model).total() == 1 + len(model.layers)


def test_without_adapters_nothing_of_ours_runs() -> None:
    model = mixture()
    with model.disable_adapter():
        assert not operators(model)


PEAK = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from moa_ops import MoAConfig, get_moa_model
torch.manual_seed(0)
sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16)
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval()
ids, adapters = torch.randint(512, (4, 128)), 0
if sys.argv[1] == "mixture":
    config = MoAConfig(r=16, target_modules="all-linear", num_experts=8, top_k=2, routing_level="token")
    model = get_moa_model(model, config).eval()
    adapters = 4 * model.num_parameters_by_kind()["adapters"]
with torch.no_grad():
    for _ in range(2):
        model(input_ids=ids)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - adapters)
"""


def test_peak_memory_is_the_plain_models_and_the_adapters() -> None:
    """Under 5 % more than the plain model, beside the adapters themselves."""
    root = str(Path(moa_ops.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    peaks = {}
    for kind in ("plain", "mixture"):
        run = subprocess.run([sys.executable, "-c", PEAK, kind], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peaks[kind] = float(run.stdout)
    assert peaks["mixture"] < 1.05 * peaks["plain"], peaks
