"""Adapters and whole mixtures between a :class:`~moa_ops.model.MoAModel` and folders.

A saved mixture is a folder with, for each adapter, a folder in PEFT's own format, and beside them
``moa_config.json`` (settings, names in expert order, scales) and ``router.safetensors``. Whatever is read is
checked before the model changes, and a folder is written whole or not at all (:mod:`moa_ops.model.files`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moa_ops.model.adapter import LoraAdapter, LoraFactors, check_adapter_name
from moa_ops.model.config import MoAConfig
from moa_ops.model.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from moa_ops.model.peft_format import CONFIG_NAME as PEFT_CONFIG
from moa_ops.model.peft_format import WEIGHTS_NAME as PEFT_WEIGHTS
from moa_ops.model.peft_format import finite_number, peft_files, read_peft_adapter, write_peft_adapter
from moa_ops.version import __version__

if TYPE_CHECKING:
    from moa_ops.model.model import MoAModel

CONFIG_NAME = "moa_config.json"
ROUTER_NAME = "router.safetensors"
_FORMAT = 1
Folder = str | os.PathLike[str]


class Storage:
    """The methods of ``MoAModel`` that read and write folders."""

    def load_adapter(self: MoAModel, folder: Folder, adapter_name: str) -> None:
        """Adds the adapter of a PEFT LoRA folder, as the last expert. Its rank, alpha and layers are its own.

        Raises ``FileNotFoundError`` or ``ValueError``, and changes nothing, for a name that is taken, for a
        folder that is damaged or holds what is not supported, and for an adapter of another model.
        """
        check_adapter_name(adapter_name)
        self.insert_adapter(read_peft_adapter(folder), adapter_name)

    def hotswap_adapter(self: MoAModel, folder: Folder, adapter_name: str) -> None:
        """Puts the adapter of a PEFT folder in the place of one: same name, expert id, scale and router rows.

        The rank and layers may be others. Outputs of all other adapters by id stay the same to the bit.
        Raises as :meth:`load_adapter`, and changes nothing.
        """
        self.expert_id(adapter_name)
        self.replace_adapter(read_peft_adapter(folder), adapter_name)

    def export_peft_adapter(self: MoAModel, adapter_name: str, folder: Folder) -> None:
        """Writes an adapter as a folder that PEFT loads with equal outputs; its scale goes into its alpha."""
        write_peft_adapter(folder, scaled_data(self, adapter_name), self._names_of_modules())

    def save_pretrained(
        self: MoAModel,
        save_directory: Folder,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Writes all adapters, the routers and the settings; see the top of the module.

        Adapters of an older save of a mixture in the folder go; other files in it stay.
        state_dict: whole tensors, as gathered from shards, to be written in the place of the model's own.
        is_main_process: False: another process writes; nothing is done.
        """
        if not is_main_process:
            return
        names = self._names_of_modules()
        gone = set(_saved_adapters(Path(save_directory))) - set(self.adapters)
        with atomic_folder(save_directory, drop=gone) as new:
            for adapter_name in self.adapters:
                folder = new / adapter_name
                folder.mkdir()
                config, tensors = peft_files(self.adapter_data(adapter_name), names)
                write_json(folder / PEFT_CONFIG, config)
                write_tensors(folder / PEFT_WEIGHTS, tensors)
            write_tensors(new / ROUTER_NAME, self.routers.state_dict())
            write_json(new / CONFIG_NAME, _describe(self))

    @classmethod
    def from_pretrained(
        cls: type[MoAModel], base_model: nn.Module, folder: Folder, *, is_trainable: bool = False
    ) -> MoAModel:
        """The mixture that :meth:`save_pretrained` wrote, in ``base_model``, which is changed in place.

        is_trainable: whether adapters and routers take gradients.

        Raises ``FileNotFoundError`` or ``ValueError`` for a folder that is damaged or does not fit the model,
        which is then as it was.
        """
        saved = read_mixture(folder)
        model = cls(base_model, replace(saved.config, num_experts=0))
        try:
            model._adapt(saved.modules)
            for name, adapter in saved.adapters.items():
                model.insert_adapter(adapter, name)
                model.set_adapter_scale(name, saved.scales[name])
            _load_routers(model, saved.routers)
        except (ValueError, RuntimeError) as error:
            model.unload()
            raise ValueError(f"{folder}: {error}") from error
        model.set_adapter(None)
        if is_trainable:
            model.set_trainable(experts=True, router=True)
        return model

    def _names_of_modules(self: MoAModel) -> list[str]:
        """Of the base model without mixtures, for PEFT's target_modules."""
        inner = tuple(f"{path}." for path in self.layers)
        return [name for name, _ in self.base_model.named_modules() if not name.startswith(inner)]


def scaled_data(model: MoAModel, adapter_name: str) -> LoraAdapter:
    """The adapter as data, with the scale it has in the model multiplied into its alphas."""
    adapter, scale = model.adapter_data(adapter_name), model.adapter_scale(adapter_name)
    if scale == 1.0:
        return adapter
    modules = {
        path: LoraFactors(f.A, f.B, f.lora_alpha * scale, f.use_rslora) for path, f in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


# -------------------------------------------------------------------------------------------- a saved mixture


@dataclass
class SavedMixture:
    """What a folder of :meth:`Storage.save_pretrained` holds, read and checked without a model.

    modules: the linears that were adapted, of some of which no adapter may be left. scales: by name, in
    expert order.
    """

    config: MoAConfig
    modules: list[str]
    scales: dict[str, float]
    adapters: dict[str, LoraAdapter] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)


def read_mixture(folder: Folder) -> SavedMixture:
    """Reads the folder. Raises ``FileNotFoundError`` or ``ValueError``."""
    folder = Path(folder)
    for name in (CONFIG_NAME, ROUTER_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no saved mixture: it has no {name}")
    values = read_json(folder / CONFIG_NAME)
    try:
        saved = _check_description(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    saved.adapters = {name: read_peft_adapter(folder / name) for name in saved.scales}
    saved.routers = read_tensors(folder / ROUTER_NAME)
    return saved


def _describe(model: MoAModel) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "moa_ops_version": __version__,
        "config": model.moa_config.to_dict(),
        "modules": list(model.layers),
        "adapters": [{"name": name, "scale": model.adapter_scale(name)} for name in model.adapters],
    }


def _check_description(values: Mapping[str, Any]) -> SavedMixture:
    """The settings of a mixture, still without its tensors."""
    if values.get("format") != _FORMAT:
        raise ValueError(f"format is {values.get('format')!r}; this version reads format {_FORMAT}")
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
    return SavedMixture(MoAConfig.from_dict(config), modules, scales)


def _saved_adapters(folder: Path) -> list[str]:
    """Names of the folders of adapters that an older save in ``folder`` lists; none if it is not readable."""
    try:
        return list(_check_description(read_json(folder / CONFIG_NAME)).scales)
    except (OSError, ValueError, TypeError):
        return []


def _load_routers(model: MoAModel, tensors: Mapping[str, Tensor]) -> None:
    own = model.routers.state_dict()
    if tensors.keys() != own.keys():
        wrong = sorted(tensors.keys() ^ own.keys())
        raise ValueError(f"{ROUTER_NAME} has other routers than this model: {wrong[:4]}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{ROUTER_NAME}: {name} is {tensor.dtype} {list(tensor.shape)}, this model has "
                f"{list(own[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{ROUTER_NAME}: {name} holds NaN or infinity")
    model.routers.load_state_dict(tensors)
