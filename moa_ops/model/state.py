"""``state_dict`` of a :class:`~moa_ops.model.MoAModel`: adapters and routers, without the frozen base.

So a checkpoint of ``transformers.Trainer`` or ``accelerate`` holds what was trained, in the size of the
adapters, also where the base has tied weights or is quantised. It describes itself: ``_extra_state`` holds
the settings and what each adapter is, as JSON in bytes, so that ``MoAModel.from_pretrained`` can read a
``model.safetensors`` too. The base has all of its own in ``model.base_model.state_dict()``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moa_ops.model.adapter import LoraFactors
from moa_ops.model.layer import is_sharded, whole_state_wanted
from moa_ops.model.peft_format import check_factors, finite_number
from moa_ops.version import __version__

if TYPE_CHECKING:
    from moa_ops.model.model import MoAModel

EXTRA = nn.modules.module._EXTRA_STATE_KEY_SUFFIX
FORMAT = 1
_BASE, _ROUTERS = "base_model.", "routers."


def leave_out_frozen(model: MoAModel, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A hook on ``state_dict``: of the base, only its buffers and what is trained of it stay."""
    if whole_state_wanted():
        state.pop(prefix + EXTRA, None)
        return
    base = model.base_model
    kept = {name for name, _ in [*base.named_buffers(remove_duplicate=False), *_parameters(base)]}
    kept -= _frozen(model)
    inner = prefix + _BASE
    for key in [key for key in state if key.startswith(inner) and key[len(inner) :] not in kept]:
        del state[key]


def nothing_missing(model: MoAModel, keys: Any) -> None:
    """A hook on ``load_state_dict``: the frozen base need not be there, nor the description."""
    optional = {_BASE + name for name in _frozen(model)} | {EXTRA}
    keys.missing_keys[:] = [key for key in keys.missing_keys if not _ends_in(key, optional)]


def _frozen(model: MoAModel) -> set[str]:
    """Names in the base of its parameters that are not trained, every name of a shared one."""
    adapters = {id(p) for layer in model.layers.values() for p in (layer.lora_A, layer.lora_B)}
    return {
        name for name, p in _parameters(model.base_model) if not p.requires_grad and id(p) not in adapters
    }


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def _ends_in(key: str, names: set[str]) -> bool:
    """Whether ``key``, or what follows the prefix of a wrapper in it, is one of ``names``."""
    parts = key.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


# -------------------------------------------------------------------------------------------- the description


def describe(model: MoAModel) -> dict[str, Any]:
    """The settings of a mixture, its adapters' names in expert order, and their scales."""
    return {
        "format": FORMAT,
        "moa_ops_version": __version__,
        "config": model.moa_config.to_dict(),
        "modules": list(model.layers),
        "adapters": [{"name": name, "scale": model.adapter_scale(name)} for name in model.adapters],
    }


def describe_stacks(model: MoAModel) -> dict[str, Any]:
    """The same, and what each adapter is in each layer."""
    values = describe(model)
    for expert, entry in enumerate(values["adapters"]):
        entry["layers"] = slots(model, expert)
    return values


def to_bytes(description: Mapping[str, Any]) -> Tensor:
    """JSON as a uint8 tensor, which safetensors can hold."""
    return torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)


def from_bytes(tensor: Tensor) -> dict[str, Any]:
    """The inverse of :func:`to_bytes`. Raises ``ValueError`` for anything else."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"{EXTRA} is not the description of a mixture")
    try:
        value = json.loads(bytes(tensor.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{EXTRA} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{EXTRA} must hold a JSON object")
    return value


def slots(model: MoAModel, expert: int) -> dict[str, list[Any]]:
    """``{path: [r, lora_alpha, use_rslora]}`` of one adapter, which its stacked tensors do not say."""
    found = {path: layer.slots[expert] for path, layer in model.layers.items()}
    return {path: [slot.r, slot.lora_alpha, slot.use_rslora] for path, slot in found.items() if slot.r}


def apply_slots(model: MoAModel, layers: Sequence[Any]) -> None:
    """Gives the adapters the alphas of a description. Raises ``ValueError`` where ranks or layers differ."""
    for expert, described in enumerate(layers):
        own = slots(model, expert)
        same = isinstance(described, dict) and described.keys() == own.keys()
        if not same or any(described[path][0] != own[path][0] for path in own):
            name = model.adapters[expert]
            raise ValueError(f"the adapter {name!r} has another rank or other layers in the state than here")
    for expert, described in enumerate(layers):
        for path, (_, alpha, use_rslora) in described.items():
            layer = model.layers[path]
            layer.slots[expert] = replace(layer.slots[expert], lora_alpha=alpha, use_rslora=use_rslora)


def factors_from_stacks(tensors: Mapping[str, Tensor], expert: int, described: Any) -> dict[str, LoraFactors]:
    """One adapter of a state dict, by path.

    described: as of :func:`slots`. Raises ``ValueError`` where the tensors do not fit it.
    """
    if not isinstance(described, dict) or not described:
        raise ValueError("an adapter is described by an object of layers")
    modules = {}
    for path, slot in described.items():
        stacks = [tensors.get(f"{_BASE}{path}.{name}") for name in ("lora_A", "lora_B")]
        if not isinstance(slot, list) or len(slot) != 3 or any(stack is None for stack in stacks):
            raise ValueError(f"the adapter's part in {path!r} is missing or not described")
        r, alpha, use_rslora = slot
        A, B = stacks
        sizes = A.dim() == B.dim() == 3 and A.shape[0] == B.shape[0] > expert and A.shape[1] == B.shape[2]
        if not sizes or not isinstance(r, int) or not 1 <= r <= A.shape[1]:
            raise ValueError(
                f"{path}: rank {r!r} does not fit lora_A {list(A.shape)}, lora_B {list(B.shape)}"
            )
        finite_number(f"lora_alpha of {path}", alpha)
        check_factors(path, A[expert, :r], B[expert, :, :r])
        modules[path] = LoraFactors(A[expert, :r], B[expert, :, :r], alpha, bool(use_rslora))
    return modules


def router_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the routers, by their names in ``model.routers``."""
    return {
        name.removeprefix(_ROUTERS): tensor for name, tensor in tensors.items() if name.startswith(_ROUTERS)
    }


# --------------------------------------------------------------------------------------------------- sharding


def gathered(model: MoAModel) -> dict[str, Tensor]:
    """The state dict with whole tensors, on every process; all processes must call it."""
    return {
        name: tensor.full_tensor() if is_sharded(tensor) else tensor
        for name, tensor in model.state_dict().items()
    }
