"""A small network, and adapters that PEFT saved for it, to be spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

X = torch.linspace(-1, 1, 7 * 12).view(7, 12)
FIRST = "base_model.model.layers.0.q_proj.lora_A.weight"


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, 8)
        self.k_proj = nn.Linear(width, 10, bias=False)
        self.out = nn.Linear(18, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.cat([self.q_proj(x), self.k_proj(x)], -1)).tanh()


class Net(nn.Module):
    """Layers whose names are ends of each other, as real models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def save_with_peft(folder: Path, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A PEFT model with adapters that do something, saved to the folder."""
    options.setdefault("target_modules", ["q_proj", "k_proj"])
    model = peft.get_peft_model(model or net(), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors_torch.load_file(path).items()}
    result = change(tensors)
    safetensors_torch.save_file(result if isinstance(result, dict) else tensors, path)
