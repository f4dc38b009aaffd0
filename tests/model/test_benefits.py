"""The six benefits claimed for mixtures of LoRAs, each shown with numbers on a small model of real text.

One small Llama over bytes is pretrained on a mixture of text found on this machine; one adapter per domain
is trained, alone; the routers are trained with domain labels. Losses are bits per byte on held-out files, counted
on the second half of a window; routers read the first half. Numbers of every test go to its report
(``--junit-xml``) and, with ``-s``, to the screen.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from corpus import CONTEXT, Corpus, random_windows

from moa_ops import MoAConfig, MoAModel

DOMAINS = ("python", "cpp", "reference", "arithmetic")
HALF = CONTEXT // 2
CONFIG = MoAConfig(r=8, lora_alpha=16, target_modules="all-linear")


@dataclass
class Trained:
    """What all tests look at. ``base`` is never changed."""

    corpus: Corpus
    base: nn.Module
    model: MoAModel
    folder: Path
    of_base: dict[str, float]
    oracle: dict[str, float]


def share(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def train(model: MoAModel, steps: int, lr: float, batch: Callable[[], dict[str, Any]]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 5) * (1 - step / steps)
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def windows_of(corpus: Corpus, names: Sequence[str], rows: int, seed: int) -> Callable[[], dict[str, Tensor]]:
    """Batches of windows of these domains in turn, with their labels and domains."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> dict[str, Tensor]:
        ids = torch.arange(rows) % len(names)
        streams = [corpus.domains[names[i]].adapt for i in ids]
        windows = torch.cat([random_windows(stream, 1, CONTEXT, generator) for stream in streams])
        return {"input_ids": windows, "labels": windows}

    return batch


@torch.no_grad()
def bits(run: Callable[[Tensor], Any], windows: Tensor) -> float:
    logits = run(windows.long()).logits[:, HALF - 1 : -1]
    return F.cross_entropy(logits.transpose(1, 2), windows[:, HALF:].long()).item() / math.log(2)


def routed(model: MoAModel) -> Callable[[Tensor], Any]:
    read = torch.arange(CONTEXT) < HALF
    return lambda windows: model(input_ids=windows, routing_mask=read.expand(windows.shape))


def by_id(model: MoAModel, name: str) -> Callable[[Tensor], Any]:
    return lambda windows: model(input_ids=windows, adapter_names=[name] * len(windows))


def losses(run: Callable[[str], Callable[[Tensor], Any]], corpus: Corpus) -> dict[str, float]:
    return {name: bits(run(name), corpus.domains[name].heldout) for name in DOMAINS}


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
