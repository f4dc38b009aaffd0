"""What routers are trained with beside the model's own loss: functions of the decisions of one pass.

All are means over the places that decide, each a mean over what it decided for: rows of the batch at sequence
level, tokens at token level, padding aside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_ops.model.config import MoAConfig
from moa_ops.model.context import Decision


def router_losses(
    decisions: Sequence[Decision], config: MoAConfig, domain_ids: Tensor | None
) -> dict[str, Tensor]:
    """The parts that ``config`` gives a coefficient, multiplied by it.

    "router": cross-entropy with ``domain_ids`` ``[B]`` (rows with a negative id do not count); "balance";
    "z"; "mutual_information". Those that need domains are left out without ``domain_ids``.
    """
    deciding = [d for d in decisions if d.logits is not None]
    if not deciding:
        return {}
    parts: dict[str, Tensor] = {}
    if domain_ids is not None and config.router_domain_loss_coef:
        parts["router"] = config.router_domain_loss_coef * _mean(
            [domain_loss(d, domain_ids) for d in deciding]
        )
    if config.router_aux_loss_coef:
        losses = [balance_loss(d, config.score_func) for d in deciding]
        parts["balance"] = config.router_aux_loss_coef * _mean(losses)
    if config.router_z_loss_coef:
        parts["z"] = config.router_z_loss_coef * _mean([z_loss(d) for d in deciding])
    if domain_ids is not None and config.router_mutual_information_coef:
        losses = [mutual_information_loss(d, domain_ids, config.score_func) for d in deciding]
        parts["mutual_information"] = config.router_mutual_information_coef * _mean(losses)
    return parts


def domain_loss(decision: Decision, domain_ids: Tensor) -> Tensor:
    """Cross-entropy of the logits with the row's domain (MoA, arXiv 2403.03432)."""
    ids = domains(decision, domain_ids)
    total = F.cross_entropy(decision.logits, ids, ignore_index=-1, reduction="sum")
    return total / (ids >= 0).sum().clamp(min=1)


def balance_loss(decision: Decision, score_func: str) -> Tensor:
    """E · Σ_e f_e P_e: f the share of choices, P the mean probability (Switch, 2101.03961); 1 if even."""
    probabilities, count = _probabilities(decision, score_func)
    experts = probabilities.shape[-1]
    chosen = decision.routing.indices[..., None] == torch.arange(experts, device=probabilities.device)
    chosen = chosen.sum((0, 1)).to(probabilities.dtype)
    share = chosen / chosen.sum().clamp(min=1)
    return experts * (share * (probabilities.sum(0) / count)).sum()


def z_loss(decision: Decision) -> Tensor:
    """Mean square of log Σ exp of the logits (ST-MoE, 2202.08906)."""
    squares = decision.logits.logsumexp(-1).square()
    if decision.mask is None:
        return squares.mean()
    return (squares * decision.mask).sum() / decision.mask.sum().clamp(min=1)


def mutual_information_loss(decision: Decision, domain_ids: Tensor, score_func: str) -> Tensor:
    """-I(domain; expert) in nats, of the joint distribution in this batch (Mod-Squad, 2212.08066)."""
    probabilities, _ = _probabilities(decision, score_func)
    ids = domains(decision, domain_ids)
    labelled = (ids >= 0).to(probabilities.dtype)
    experts = probabilities.shape[-1]
    one_hot = F.one_hot(ids.clamp(min=0), experts) * labelled[:, None]
    joint = one_hot.t() @ probabilities / labelled.sum().clamp(min=1)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    tiny = torch.finfo(joint.dtype).tiny
    return -(joint * (joint.clamp(min=tiny).log() - independent.clamp(min=tiny).log())).sum()


def domains(decision: Decision, domain_ids: Tensor) -> Tensor:
    """The domain of each thing decided for, ``[N]``; -1 where unknown or padding."""
    count = decision.logits.shape[0]
    ids = domain_ids.to(decision.logits.device).repeat_interleave(count // len(domain_ids))
    ids = ids.clamp(min=-1)
    return ids if decision.mask is None else torch.where(decision.mask, ids, -1)


def _probabilities(decision: Decision, score_func: str) -> tuple[Tensor, Tensor | int]:
    """``[N, E]``, rows sum to 1 or, for padding, to 0; and how many rows count."""
    if score_func == "softmax":
        probabilities = decision.logits.softmax(-1)
    else:
        probabilities = decision.logits.sigmoid()
        probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp(min=1e-20)
    if decision.mask is None:
        return probabilities, max(len(probabilities), 1)
    return probabilities * decision.mask[:, None], decision.mask.sum().clamp(min=1)


def _mean(losses: Sequence[Tensor]) -> Tensor:
    first = losses[0]
    return torch.stack([loss.to(first.device) for loss in losses]).mean()
