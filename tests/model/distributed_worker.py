"""Two processes train one mixture; run by ``test_distributed`` through ``torch.distributed.run``.

Every case is trained three times on the same batches: by one process on whole batches, by two under DDP, and
by two under FSDP2, each on its half. Rank 0 writes losses and what became of the parameters as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import batch_of, build, mixture

from moa_ops import MoAModel

STEPS = 3
# The first process sees rows 0 and 1, the second rows 2 and 3; they have no expert in common.
CASES: dict[str, dict[str, Any]] = {
    "by id": {"adapter_names": ["a", "a", "c", "__base__"]},
    "teacher forced": {"domain_ids": torch.tensor([0, 0, 2, 1]), "routing_mode": "teacher_forced"},
    "routed": {"domain_ids": torch.tensor([0, 1, 2, 1])},
    "one adapter": {},
}


def make(case: str) -> MoAModel:
    model = mixture("llama").train()
    if case == "one adapter":
        model.set_adapter("b")
    model.set_trainable(experts=True, router=case in ("teacher forced", "routed"))
    return model


def train(model: nn.Module, case: str, rows: slice) -> list[float]:
    """Losses of this process's rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        batch = batch_of("llama", rows=4, seed=step)
        batch["attention_mask"].fill_(
            1
        )  # as many tokens in either half, so that the mean of means is the mean
        batch["labels"] = batch["input_ids"]
        given = {
            name: value[rows] if not isinstance(value, str) else value for name, value in CASES[case].items()
        }
        loss = model(**{name: value[rows] for name, value in batch.items()}, **given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Trained tensors, gathered from shards."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in inner.state_dict().items()
        if name != "_extra_state"
    }


def base_is_unchanged(model: nn.Module) -> bool:
    plain = dict(build("llama").named_parameters())
    found = [
        (name.rpartition("base_model.")[2].replace("base_layer.", ""), p)
        for name, p in model.named_parameters()
        if "base_model." in name and "lora_" not in name and "active_" not in name
    ]
    assert len(found) == len(plain)
    return all(
        torch.equal(p.full_tensor() if hasattr(p, "full_tensor") else p, plain[name]) for name, p in found
    )


def shard(model: MoAModel) -> MoAModel:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.base_model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sent_from_one_process(case: str) -> list[float]:
    """As accelerate's FSDP2 does with cpu_ram_efficient_loading: only rank 0 has the weights at first."""
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict, get_non_persistent_buffers

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    model = make(case)
    if dist.get_rank() > 0:
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
    state = model.state_dict()
    names = get_non_persistent_buffers(model, recurse=True, fqns=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name in names}
    model = shard(model.to("meta"))
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=dist.get_rank() == 0), model, state)
    for name, buffer in buffers.items():
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent).register_buffer(last, buffer, persistent=False)
    del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return mean_over_processes(train(model, case, half))


def mean_over_processes(losses: list[float]) -> list[float]:
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).tolist()


def run(case: str, folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    half = slice(2 * rank, 2 * rank + 2)
    alone = make(case)
    expected = train(alone, case, slice(0, 4))
    state = whole_state(alone)
    result: dict[str, Any] = {"one process": expected}
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
        model = wrap(make(case))
        result[name] = mean_over_processes(train(model, case, half))
        ours = whole_state(model)
        result[f"{name} state"] = max((t - state[key]).abs().max().item() for key, t in ours.items())
        result[f"{name} base"] = base_is_unchanged(model)
        if name == "fsdp2":
            model.save_pretrained(folder / case.replace(" ", "_"))
            again = MoAModel.from_pretrained(build("llama"), folder / case.replace(" ", "_"))
            saved = whole_state(again)
            result["saved"] = max((t - ours[key]).abs().max().item() for key, t in saved.items())
            result["saved keys"] = saved.keys() == ours.keys()
    if find_spec("accelerate"):
        result["sent"] = sent_from_one_process(case)
    return result


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {case: run(case, Path(sys.argv[1])) for case in CASES}
    if dist.get_rank() == 0:
        Path(sys.argv[1], "results.json").write_text(json.dumps(results))
    dist.barrier()  # gloo aborts a process that leaves while the other is still at work with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
