"""What routers decide, counted: ``with model.record_routing() as record``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moa_ops.model.context import Call, Decision


@dataclass
class _Place:
    """Sums over the decisions of one place, in float64 on the CPU."""

    tokens: Tensor  # [E] tokens that chose each expert
    weight: Tensor  # [E] their gate weights
    domains: Tensor  # [D, E] tokens by domain, rows up to the largest domain seen
    decided: float = 0.0
    entropy: float = 0.0


@dataclass
class RoutingRecord:
    """Counts of what was decided while it recorded, by place (block, linear or "model"); padding aside.

    Decisions by id, by a set adapter, and recomputations under checkpointing are not counted. A decision for
    a whole row counts with the row's tokens. A generation's row-level decisions count once, at the prompt.
    """

    adapters: list[str]
    score_func: str = "softmax"
    places: dict[str, _Place] = field(default_factory=dict)

    def observe(self, call: Call) -> None:
        """Adds the decisions of a call."""
        for decision in call.decisions:
            self._add(decision, call.domain_ids)

    @torch.no_grad()
    def _add(self, decision: Decision, domain_ids: Tensor | None) -> None:
        indices, weights = decision.routing.indices.cpu(), decision.routing.weights.double().cpu()
        count, experts = len(indices), decision.routing.num_experts
        sizes = torch.as_tensor(decision.sizes, dtype=torch.float64).cpu().expand(count)
        if decision.mask is not None:
            sizes = sizes * decision.mask.cpu()
        empty = torch.zeros(experts, dtype=torch.float64)
        place = self.places.setdefault(
            decision.site, _Place(empty, empty.clone(), empty.new_zeros(0, experts))
        )
        if len(place.tokens) != experts:
            raise RuntimeError(
                "the number of adapters changed while routing was recorded; start another record"
            )

        chosen = torch.nn.functional.one_hot(indices.clamp(min=0), experts) * (indices >= 0)[..., None]
        by_row = chosen.sum(1).double() * sizes[:, None]  # [N, E]
        place.tokens += by_row.sum(0)
        place.weight += torch.einsum("nke,nk,n->e", chosen.double(), weights, sizes)
        place.decided += sizes.sum().item()
        if decision.logits is not None:
            place.entropy += (
                (_entropy(_normal(decision.logits.double().cpu(), self.score_func)) * sizes).sum().item()
            )
        if domain_ids is not None:
            ids = domain_ids.cpu().repeat_interleave(count // len(domain_ids))
            missing = int(ids.max()) + 1 - len(place.domains)
            if missing > 0:
                place.domains = torch.cat([place.domains, place.domains.new_zeros(missing, experts)])
            place.domains.index_add_(0, ids[ids >= 0], by_row[ids >= 0])

    def stats(self) -> dict[str, Any]:
        """Plain numbers: ``adapters``, and under ``layers`` by place, with E adapters and D domains,

        tokens_per_expert ``[E]``; share ``[E]`` of all choices, largest_share; entropy of the shares and
        decision_entropy, the mean of the decisions' own, both divided by log E (1: even, 0: one for all);
        mean_weight ``[E]`` of those that chose the expert; domain_expert ``[D][E]``, each domain's shares.
        """
        return {"adapters": self.adapters, "layers": {site: _stats(p) for site, p in self.places.items()}}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws shares by place and expert, and by domain and expert where domains were given.

        Needs matplotlib; the format follows from the file's name.
        """
        from matplotlib.figure import Figure

        layers = self.stats()["layers"]
        if not layers:
            raise ValueError("nothing was recorded: run the model, routed, within record_routing()")
        domains = sum(_padded([place.domains for place in self.places.values()]))
        pictures = [("share of choices", list(layers), [layer["share"] for layer in layers.values()])]
        if len(domains):
            names = [self.adapters[d] if d < len(self.adapters) else str(d) for d in range(len(domains))]
            shares = domains / domains.sum(1, keepdim=True).clamp(min=1)
            pictures.append(("share by domain, all layers", names, shares.tolist()))
        heights = [1.2 + 0.25 * len(rows) for _, rows, _ in pictures]
        figure = Figure((2.5 + 0.6 * len(self.adapters), sum(heights)), layout="constrained")
        axes = figure.subplots(len(pictures), squeeze=False, height_ratios=heights)[:, 0]
        for ax, (title, rows, values) in zip(axes, pictures, strict=True):
            image = ax.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
            ax.set_title(title)
            ax.set_yticks(range(len(rows)), rows, fontsize=8)
            ax.set_xticks(range(len(self.adapters)), self.adapters, rotation=30, ha="right", fontsize=8)
            figure.colorbar(image, ax=ax)
        figure.savefig(path, dpi=120)


def _stats(place: _Place) -> dict[str, Any]:
    experts, total = len(place.tokens), place.tokens.sum().clamp(min=1)
    share = place.tokens / total
    scale = max(torch.tensor(float(experts)).log().item(), 1e-12)
    by_domain = place.domains / place.domains.sum(1, keepdim=True).clamp(min=1)
    return {
        "tokens_per_expert": place.tokens.tolist(),
        "share": share.tolist(),
        "largest_share": share.max().item(),
        "entropy": _entropy(share).item() / scale,
        "decision_entropy": place.entropy / max(place.decided, 1) / scale,
        "mean_weight": (place.weight / place.tokens.clamp(min=1)).tolist(),
        "domain_expert": by_domain.tolist(),
    }


def _normal(logits: Tensor, score_func: str) -> Tensor:
    if score_func == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)


def _entropy(shares: Tensor) -> Tensor:
    return -torch.special.xlogy(shares, shares).sum(-1)


def _padded(tables: list[Tensor]) -> list[Tensor]:
    rows = max(len(table) for table in tables)
    return [torch.cat([t, t.new_zeros(rows - len(t), t.shape[1])]) for t in tables]
