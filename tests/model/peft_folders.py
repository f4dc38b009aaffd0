"""Adapters saved by PEFT for the models of ``zoo``, and what to run these with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import batch_of, build, without_labels

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wo"],
}


def inputs(family: str, **options: Any) -> dict[str, Tensor]:
    """Arguments of ``forward`` without labels, four rows unless said otherwise."""
    return without_labels(batch_of(family, **{"rows": 4, **options}))


def peft_folder(folder: Any, family: str, seed: int, **options: Any) -> None:
    """An adapter trained by nobody, but whose B is not zero, saved by PEFT."""
    peft = pytest.importorskip("peft")
    options.setdefault("target_modules", TARGETS[family])
    options.setdefault("fan_in_fan_out", family == "gpt2")
    torch.manual_seed(seed)
    model = peft.get_peft_model(build(family), peft.LoraConfig(**options))
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
