"""What the demo measures: bits per byte, router decisions, the composition's properties, and speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from corpus import CONTEXT, Corpus
from torch import Tensor, nn
from train import PROMPT, Progress, prompt_mask

from moa_ops import MoAModel

BATCH = 16
Run = Callable[[Tensor], Any]  # windows [B, S] -> the model's output


@dataclass
class Scores:
    """Per held-out window: ``bits`` [windows] per byte after the prompt; ``choices`` [blocks, windows]."""

    bits: Tensor
    choices: Tensor | None

    @property
    def mean(self) -> float:
        """Over the windows."""
        return self.bits.mean().item()


@torch.no_grad()
def score(run: Run, windows: Tensor, progress: Progress | None = None) -> Scores:
    """Runs held-out windows [n, CONTEXT] through a model; only bytes after the first PROMPT count."""
    bits, choices = [], []
    for batch in windows.split(BATCH):
        batch = batch.long()
        out = run(batch)
        loss = F.cross_entropy(
            out.logits[:, PROMPT - 1 : -1].transpose(1, 2), batch[:, PROMPT:], reduction="none"
        )
        bits.append(loss.mean(1) / math.log(2))
        if getattr(out, "moa_router_logits", None):
            choices.append(torch.stack([logits.argmax(-1) for logits in out.moa_router_logits.values()]))
        if progress:
            progress(bits[-1].mean().item())
    return Scores(torch.cat(bits), torch.cat(choices, dim=1) if choices else None)


def plain_run(model: nn.Module) -> Run:
    return lambda windows: model(input_ids=windows)


def by_id_run(model: MoAModel, name: str) -> Run:
    return lambda windows: model(windows, adapter_names=[name] * len(windows))


def routed_run(model: MoAModel) -> Run:
    return lambda windows: model(windows, routing_mask=prompt_mask(windows))


def unigram_bits(corpus: Corpus) -> dict[str, float]:
    """Bits per byte of each domain's held-out text under its own byte frequencies: no context at all."""
    bits = {}
    for name, domain in corpus.domains.items():
        counts = torch.bincount(domain.adapt.long(), minlength=256).double() + 1e-2
        scored = domain.heldout[:, PROMPT:].long()
        bits[name] = -(counts / counts.sum()).log2()[scored].mean().item()
    return bits


def expert_shares(routed: dict[str, Scores], experts: int) -> Tensor:
    """[domains, experts]: the share of each expert in the routers' choices, over all blocks and windows."""
    return torch.stack(
        [torch.bincount(s.choices.flatten(), minlength=experts) / s.choices.numel() for s in routed.values()]
    )


def router_accuracy(routed: dict[str, Scores], experts: list[str]) -> list[float]:
    """Per block: how often the router chose the adapter of the window's domain (a mean over domains)."""
    hits = [(s.choices == experts.index(name)).float().mean(1) for name, s in routed.items()]
    return torch.stack(hits).mean(0).tolist()


@torch.no_grad()
def outputs_by_id(model: MoAModel, windows: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Logits of the same windows under each adapter, to compare bit for bit."""
    return {name: by_id_run(model, name)(windows.long()).logits for name in names}


def interleaved_times(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each run, taken in turns so that a slow moment of the machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first round only warms up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.no_grad()
def slowdown(plain: nn.Module, mixtures: dict[str, MoAModel], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second without gradients, of the plain model and each mixture: whole windows, generation."""
    windows = torch.randint(32, 127, (8, CONTEXT), generator=torch.Generator().manual_seed(0))
    mask = prompt_mask(windows)
    runs: dict[str, Callable[[], object]] = {"plain": lambda: plain(input_ids=windows)}
    for name, model in mixtures.items():
        runs[name] = lambda model=model: model(windows, routing_mask=mask)
    reading = {name: windows.numel() / seconds for name, seconds in interleaved_times(runs, rounds).items()}

    new = 32
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    prompt = windows[:1, :PROMPT]
    runs = {"plain": lambda: plain.generate(prompt, attention_mask=torch.ones_like(prompt), **options)}
    for name, model in mixtures.items():
        runs[name] = lambda model=model: model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **options
        )
    generating = {
        name: new / seconds for name, seconds in interleaved_times(runs, max(2, rounds // 3)).items()
    }
    return {"reading": reading, "generating": generating}


def arithmetic_floor(model: MoAModel) -> float:
    """Multiply-adds of the adapted linears with one adapter per token, over those without."""
    base = extra = 0
    for layer in model.layers.values():
        base += layer.in_features * layer.out_features
        extra += layer.r * (layer.in_features + layer.out_features)
    return 1 + extra / base


@torch.no_grad()
def samples(model: MoAModel, corpus: Corpus, new_bytes: int, seed: int) -> dict[str, dict[str, str]]:
    """Per domain: a held-out prompt, what the routed model writes after it, and its most chosen adapter."""
    prompts = torch.stack(
        [domain.heldout[len(domain.heldout) // 2, :PROMPT].long() for domain in corpus.domains.values()]
    )
    chosen = torch.stack([z.argmax(-1) for z in model(prompts).moa_router_logits.values()]).mode(0).values
    torch.manual_seed(seed)
    text = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_bytes,
        min_new_tokens=new_bytes,
        do_sample=True,
        temperature=0.6,
        top_k=0,
    )
    return {
        name: {
            "adapter": model.adapters[chosen[row]],
            "prompt": _decode(prompts[row]),
            "text": _decode(text[row, PROMPT:]),
        }
        for row, name in enumerate(corpus.domains)
    }


def _decode(codes: Tensor) -> str:
    return "".join(chr(code) if chr(code).isprintable() or code == 10 else "·" for code in codes.tolist())
