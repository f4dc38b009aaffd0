"""Adapters and whole mixtures between a :class:`~moa_ops.model.MoAModel` and folders.

A saved mixture is a folder with, for each adapter, a folder in PEFT's own format, and beside them
``moa_config.json`` (settings, names in expert order, scales) and ``router.safetensors``. Whatever is read is
checked before the model changes, and a folder is written whole or not at all (:mod:`moa_ops.model.files`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moa_ops.model import state
from moa_ops.model.adapter import LoraAdapter, LoraFactors, check_adapter_name
from moa_ops.model.files import atomic_folder, write_json, write_tensors
from moa_ops.model.layer import is_sharded
from moa_ops.model.peft_format import CONFIG_NAME as PEFT_CONFIG
from moa_ops.model.peft_format import WEIGHTS_NAME as PEFT_WEIGHTS
from moa_ops.model.peft_format import peft_files, read_peft_adapter, write_peft_adapter
from moa_ops.model.saved import (
    CONFIG_NAME,
    ROUTER_NAME,
    check_description,
    check_routers,
    read_mixture,
    saved_adapters,
)

if TYPE_CHECKING:
    from moa_ops.model.model import MoAModel

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
        state_dict: whole tensors, as gathered from shards, to be written in the place of the model's own. A
            model sharded by FSDP2 gathers its own: then all processes call this, and the first one writes.
        is_main_process: False: another process writes; nothing is done.
        """
        sharded = any(is_sharded(layer.lora_A) for layer in self.layers.values())
        if sharded:
            state_dict = state.gathered(self) if state_dict is None else state_dict
            is_main_process = is_main_process and torch.distributed.get_rank() == 0
        if is_main_process:
            self._write_mixture(Path(save_directory), state_dict)
        if sharded:
            torch.distributed.barrier()

    def _write_mixture(self: MoAModel, save_directory: Path, state_dict: Mapping[str, Tensor] | None) -> None:
        names = self._names_of_modules()
        routers = self.routers.state_dict() if state_dict is None else state.router_tensors(state_dict)
        gone = set(saved_adapters(save_directory)) - set(self.adapters)
        with atomic_folder(save_directory, drop=gone) as new:
            for expert, adapter_name in enumerate(self.adapters):
                if state_dict is None:
                    adapter = self.adapter_data(adapter_name)
                else:
                    modules = state.factors_from_stacks(state_dict, expert, state.slots(self, expert))
                    adapter = self._as_data(adapter_name, modules)
                folder = new / adapter_name
                folder.mkdir()
                config, tensors = peft_files(adapter, names)
                write_json(folder / PEFT_CONFIG, config)
                write_tensors(folder / PEFT_WEIGHTS, tensors)
            write_tensors(new / ROUTER_NAME, routers)
            write_json(new / CONFIG_NAME, state.describe(self))

    @classmethod
    def from_pretrained(
        cls: type[MoAModel], base_model: nn.Module, folder: Folder, *, is_trainable: bool = False
    ) -> MoAModel:
        """The mixture that :meth:`save_pretrained` wrote, in ``base_model``, which is changed in place.

        folder: also one with a ``model.safetensors`` of the mixture's ``state_dict``, such as a checkpoint of
            ``transformers.Trainer``.
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
            check_routers(saved.routers, model.routers.state_dict())
            model.routers.load_state_dict(saved.routers)
        except (ValueError, RuntimeError) as error:
            model.unload()
            raise ValueError(f"{folder}: {error}") from error
        model.set_adapter(None)
        if is_trainable:
            model.set_trainable(experts=True, router=True)
        return model

    # state_dict and load_state_dict, see moa_ops.model.state

    def get_extra_state(self: MoAModel) -> Tensor:
        """What the adapters in the state dict are: names, ranks, alphas, scales, and the settings."""
        return state.to_bytes(state.describe_stacks(self))

    def set_extra_state(self: MoAModel, extra: Tensor) -> None:
        """Takes alphas and scales from a state dict, before its tensors are loaded.

        Raises ``ValueError``, and nothing is loaded, where its adapters are not those of this model.
        """
        saved = check_description(state.from_bytes(extra))
        if list(saved.scales) != self.adapters:
            raise ValueError(
                f"the state is of the adapters {list(saved.scales)}, this model has {self.adapters}; add or "
                "rename them first, in this order, or use MoAModel.from_pretrained"
            )
        state.apply_slots(self, saved.layers)
        for name, scale in saved.scales.items():
            self.set_adapter_scale(name, scale)

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
