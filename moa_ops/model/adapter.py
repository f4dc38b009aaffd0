"""One LoRA adapter as plain data: what is read from disk, written to disk, merged and loaded into a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BASE_NAME = "__base__"  # in lists of adapter names: no adapter


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The update ΔW = scaling · B A of one linear layer.

    A: ``[r, in]``, B: ``[out, r]``, floating, in any layout of the base weight (also under ``Conv1D``).
    lora_alpha, use_rslora: scaling = lora_alpha / r, with rsLoRA lora_alpha / √r (arXiv 2312.03732).
    """

    A: Tensor
    B: Tensor
    lora_alpha: float
    use_rslora: bool = False

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW ``[out, in]``, computed in ``dtype``, by default that of A."""
        dtype = dtype or self.A.dtype
        return self.scaling * (self.B.to(dtype) @ self.A.to(dtype))


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter: factors by the path of their layer, as ``named_modules`` of the base model gives it.

    lora_dropout: the probability it was trained with.
    fan_in_fan_out: whether the base layers keep their weight as ``[in, out]`` (GPT-2's ``Conv1D``).
    notes: settings that change no output and are kept: task_type, base_model_name_or_path, revision.
    """

    modules: Mapping[str, LoraFactors]
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    notes: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """The largest rank of any layer."""
        return max(factors.r for factors in self.modules.values())


def check_adapter_name(name: str) -> str:
    """Returns ``name`` if it can name an adapter, which is also a folder and part of a parameter's name.

    Allowed are letters, digits, "_" and "-" of ASCII, at most 128. Raises ``ValueError`` for others and for
    "__base__", which stands for no adapter.
    """
    if name == BASE_NAME:
        raise ValueError(f"{BASE_NAME!r} stands for the base model without an adapter; choose another name")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]{0,127}", name, re.ASCII):
        shown = repr(name) if len(repr(name)) < 100 else repr(name)[:97] + "..."
        raise ValueError(
            f"{shown} cannot name an adapter: it becomes the name of a folder, so use up to 128 letters, "
            "digits, '_' and '-', not beginning with '-'"
        )
    return name
