"""A saved mixture: what its files hold, read and checked without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moa_ops.model import state
from moa_ops.model.adapter import LoraAdapter, check_adapter_name
from moa_ops.model.config import MoAConfig
from moa_ops.model.files import read_json, read_tensors
from moa_ops.model.peft_format import finite_number, read_peft_adapter

CONFIG_NAME = "moa_config.json"
ROUTER_NAME = "router.safetensors"
STATE_NAME = "model.safetensors"


@dataclass
class SavedMixture:
    """Settings, and then tensors, of a mixture.

    modules: the linears that were adapted, of some of which no adapter may be left. scales: by name, in
    expert order. layers: ``{path: [r, lora_alpha, use_rslora]}`` of each adapter, in a state dict.
    """

    config: MoAConfig
    modules: list[str]
    scales: dict[str, float]
    layers: list[Any]
    adapters: dict[str, LoraAdapter] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)


def read_mixture(folder: str | os.PathLike[str]) -> SavedMixture:
    """Reads a folder of ``save_pretrained``, or one with the ``state_dict`` of a mixture.

    Raises ``FileNotFoundError`` or ``ValueError``.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file() and (folder / STATE_NAME).is_file():
        return _read_state(folder / STATE_NAME)
    for name in (CONFIG_NAME, ROUTER_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no saved mixture: it has no {name}")
    values = read_json(folder / CONFIG_NAME)
    try:
        saved = check_description(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    saved.adapters = {name: read_peft_adapter(folder / name) for name in saved.scales}
    saved.routers = read_tensors(folder / ROUTER_NAME)
    return saved


def _read_state(path: Path) -> SavedMixture:
    tensors = read_tensors(path)
    if state.EXTRA not in tensors:
        raise ValueError(f"{path} is not the state of a mixture: it has no {state.EXTRA}")
    try:
        saved = check_description(state.from_bytes(tensors[state.EXTRA]))
        for expert, name in enumerate(saved.scales):
            factors = state.factors_from_stacks(tensors, expert, saved.layers[expert])
            saved.adapters[name] = LoraAdapter(factors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    saved.routers = state.router_tensors(tensors)
    return saved


def check_description(values: Mapping[str, Any]) -> SavedMixture:
    """What :func:`moa_ops.model.state.describe` gave, still without tensors. Raises ``ValueError``."""
    if values.get("format") != state.FORMAT:
        raise ValueError(f"format is {values.get('format')!r}; this version reads format {state.FORMAT}")
    config, modules, adapters = (values.get(name) for name in ("config", "modules", "adapters"))
    if not isinstance(config, dict) or not isinstance(modules, list) or not isinstance(adapters, list):
        raise ValueError("config must be an object, modules and adapters lists")
    if not all(isinstance(path, str) for path in modules):
        raise ValueError("modules must be a list of names")
    scales: dict[str, float] = {}
    for entry in adapters:
        if not isinstance(entry, dict):
            raise ValueError(f"an adapter must be an object with name and scale, got {entry!r}")
        name, scale = check_adapter_name(entry.get("name")), entry.get("scale", 1.0)
        finite_number(f"the scale of {name}", scale)
        if name in scales:
            raise ValueError(f"two adapters are called {name!r}")
        scales[name] = float(scale)
    layers = [entry.get("layers") for entry in adapters]
    return SavedMixture(MoAConfig.from_dict(config), modules, scales, layers)


def saved_adapters(folder: Path) -> list[str]:
    """Names of the folders of adapters that an older save in ``folder`` lists; none if it is not readable."""
    try:
        return list(check_description(read_json(folder / CONFIG_NAME)).scales)
    except (OSError, ValueError, TypeError):
        return []


def check_routers(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` where ``tensors`` are not those of routers with the state ``own``."""
    if tensors.keys() != own.keys():
        wrong = sorted(tensors.keys() ^ own.keys())
        raise ValueError(f"the saved routers are other ones than this model has: {wrong[:4]}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"the router {name} is {tensor.dtype} {list(tensor.shape)}, this model has "
                f"{list(own[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"the router {name} holds NaN or infinity")
