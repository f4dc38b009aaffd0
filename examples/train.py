"""The demo's model and its three kinds of training: the base, one adapter alone, the routers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from corpus import CONTEXT, Corpus, random_windows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moa_ops import MoAModel

PROMPT = 128  # bytes a router may read; bits per byte are counted on what follows
Progress = Callable[[float], None]  # called after every step with the loss in bits per byte


@dataclass(frozen=True)
class Settings:
    """Sizes of one run. Steps are fixed, not time, so that a run can be repeated exactly."""

    hidden_size: int = 256
    layers: int = 3
    intermediate_size: int = 640
    rank: int = 8
    pretrain_steps: int = 370
    adapter_steps: int = 100
    router_steps: int = 112
    pretrain_batch: int = 4  # windows of CONTEXT bytes a step, or as many bytes in shorter ones
    adapter_batch: int = 2
    router_batch: int = 32
    pretrain_bytes: int = 4_000_000
    adapt_bytes: int = 800_000
    heldout_windows: int = 48
    matrix_windows: int = 16
    sample_bytes: int = 120
    timing_rounds: int = 9
    seed: int = 0


FAST = Settings(
    hidden_size=128,
    layers=2,
    intermediate_size=384,
    pretrain_steps=150,
    adapter_steps=40,
    router_steps=30,
    pretrain_bytes=1_000_000,
    adapt_bytes=60_000,
    heldout_windows=16,
    matrix_windows=8,
    sample_bytes=48,
    timing_rounds=3,
)


def build_base(settings: Settings) -> LlamaForCausalLM:
    """A small Llama over bytes with freshly drawn weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // 64,
        num_key_value_heads=settings.hidden_size // 64,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # each block starts as the identity
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
    return model


def share(model: nn.Module) -> nn.Module:
    """A second model over the same base weights, with adapters and routers of its own."""
    own = {id(p) for name, p in model.named_parameters() if "lora_" in name or name.startswith("routers.")}
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters() if id(p) not in own})


def pretrain(model: LlamaForCausalLM, stream: Tensor, settings: Settings, progress: Progress) -> None:
    """Next-byte training on the pretraining stream: Muon for the blocks' matrices, AdamW for the rest.

    Every step sees as many bytes, in windows that are short at first: a small model learns faster that way.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon_rate, adam_rate = 12e-3, 10e-3
    muon = Muon(matrices, lr=muon_rate)
    adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    for step in range(settings.pretrain_steps):
        rate = _warmup_and_decay(step, settings.pretrain_steps)
        muon.lr, adam.param_groups[0]["lr"] = muon_rate * rate, adam_rate * rate
        done = step / settings.pretrain_steps
        length = CONTEXT // 4 if done < 0.6 else CONTEXT // 2 if done < 0.85 else CONTEXT
        windows = random_windows(stream, settings.pretrain_batch * CONTEXT // length, length, generator)
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        muon.step()
        adam.step()
        model.zero_grad()
        progress(loss.item() / math.log(2))


def train_adapter(
    model: MoAModel,
    streams: list[Tensor],
    steps: int,
    settings: Settings,
    progress: Progress,
    *,
    lr: float = 7e-3,
    seed: int = 2,
) -> None:
    """Trains the adapter that is set (``set_adapter``) on windows drawn evenly from ``streams``."""
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed + seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * _warmup_and_decay(step, steps)
        windows = torch.cat(
            [
                random_windows(
                    streams[(step * settings.adapter_batch + row) % len(streams)], 1, CONTEXT, generator
                )
                for row in range(settings.adapter_batch)
            ]
        )
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress(loss.item() / math.log(2))


def train_router(
    model: MoAModel, corpus: Corpus, settings: Settings, progress: Progress, *, lr: float = 3e-2
) -> None:
    """Trains the routers alone, teacher-forced.

    Every row is as long as a prompt and runs through its domain's adapter. On every eighth step the adapter
    is weighted with the probability the router gave it, so that the LM loss reaches the router too, whose
    gradient has to come back through the whole model; on the others its weight is 1, and only the router's
    cross-entropy counts.
    """
    model.set_trainable(experts=False, router=True)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed + 3)
    names = model.adapters
    for step in range(settings.router_steps):
        optimizer.param_groups[0]["lr"] = lr * _warmup_and_decay(step, settings.router_steps)
        ids = torch.randint(len(names), (settings.router_batch,), generator=generator)
        windows = torch.cat(
            [random_windows(corpus.domains[names[e]].adapt, 1, PROMPT, generator) for e in ids]
        )
        labels = windows if step % 8 == 0 else None
        model.update_routing(norm_topk_prob=labels is None)
        out = model(windows, labels=labels, domain_ids=ids, routing_mode="teacher_forced")
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress(out.moa_losses["router"].item() / math.log(2))
    model.update_routing(norm_topk_prob=False)


def prompt_mask(windows: Tensor) -> Tensor:
    """[B, S] bool: True on the first PROMPT bytes, all that a router sees of a window."""
    return torch.arange(windows.shape[1]).lt(PROMPT).expand(windows.shape)


class Muon:
    """Momentum whose update is made orthogonal by Newton-Schulz steps (Jordan et al. 2024), in float32.

    Matrices of one shape go through the steps together, as a batch.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.8):
        self.lr, self.momentum = lr, momentum
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for matrix in matrices:
            rows, columns = matrix.shape
            self.groups.setdefault((min(rows, columns), max(rows, columns)), []).append(matrix)
        self.averages = {shape: [torch.zeros_like(m) for m in group] for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self) -> None:
        """One update of all matrices from their gradients."""
        for (rows, columns), group in self.groups.items():
            gradients, averages = [matrix.grad for matrix in group], self.averages[rows, columns]
            torch._foreach_lerp_(averages, gradients, 1 - self.momentum)
            updates = torch._foreach_lerp(gradients, averages, self.momentum)
            wide = torch.stack([u if u.shape[0] == rows else u.t() for u in updates])
            wide /= wide.norm(dim=(1, 2), keepdim=True) + 1e-7
            for _ in range(3):
                gram = wide @ wide.mT
                gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
                wide = torch.baddbmm(wide, gram, wide, beta=3.4445)
            for matrix, update in zip(group, wide, strict=True):
                matrix.add_(
                    update if matrix.shape[0] == rows else update.t(), alpha=-0.2 * columns**0.5 * self.lr
                )


def _warmup_and_decay(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 10) * (1 - step / steps)
