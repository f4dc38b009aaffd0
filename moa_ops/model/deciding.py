"""``RouterSet``: all routers of a model, and how they decide for its blocks and linears."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moa_ops import functional
from moa_ops.model.config import MoAConfig
from moa_ops.model.context import Block, Call, Decision, current
from moa_ops.model.layer import AdaptedLinear
from moa_ops.model.routers import KINDS, LinearRouter, MLPRouter, StaticRouter
from moa_ops.reference import accumulation_dtype
from moa_ops.routing import Routing

MODEL_SITE = "model"  # the one site of router_granularity="model"


def key_of(site: str) -> str:
    """A site's path as a key of ``nn.ModuleDict``, which allows no dots."""
    return site.replace(".", "/")


class RouterSet(nn.ModuleDict):
    """A router per site, and the decisions they make. Sites are paths of blocks or of linears, or "model"."""

    def __init__(self, config: MoAConfig) -> None:
        super().__init__()
        self.config = config

    def add_site(self, site: str, in_features: int, num_experts: int, device: Any) -> None:
        """A fresh router, unless the site has one."""
        if key_of(site) not in self:
            kind = KINDS[self.config.router_type]
            self[key_of(site)] = kind(in_features, num_experts, device, hidden=self.config.router_hidden_size)

    def sites(self) -> list[str]:
        """Paths of all sites."""
        return [key.replace("/", ".") for key in self]

    def site_of(self, layer: AdaptedLinear) -> str:
        """The site that decides for a linear; one outside of all blocks always decides for itself."""
        if self.config.router_granularity == "module" or layer.block is None:
            return layer.path
        return layer.block if self.config.router_granularity == "block" else MODEL_SITE

    # Deciding.

    def enter_block(self, call: Call, block: str, given: Mapping[str, Any]) -> None:
        """Decides for a block that is about to run with these arguments, by name."""
        if self.config.router_granularity == "module":
            return
        hidden, encoder, mask = _hidden_states(given), call.block.encoder, call.block.mask
        if hidden is None:
            raise ValueError(
                f"block {block} got no floating tensor [.., .., width] to route by; use "
                "router_granularity='module'"
            )
        sequence = self.config.routing_level == "sequence"
        if self.config.router_granularity == "model":
            stack = "" if sequence else block.rpartition(".")[0]
            if stack not in call.by_model:
                if call.grad and not torch.is_grad_enabled():
                    raise RuntimeError(
                        "router_granularity='model' decides within a checkpointed region here, which "
                        "use_reentrant=True runs without gradients; pass use_reentrant=False"
                    )
                call.by_model[stack] = self.decide(call, MODEL_SITE, hidden, mask)
            call.block.decision = call.by_model[stack]
        elif sequence and encoder is not None:
            # What a decoder's row is about is said by the encoder's states, and known before the first token.
            call.block.decision = self.decide(call, block, encoder, call.encoder_mask)
        else:
            call.block.decision = self.decide(call, block, hidden, mask)

    def routing(self, call: Call, layer: AdaptedLinear, x: Tensor) -> Routing:
        """The routing of x in ``layer``: its block's decision, or its own."""
        block = call.block if layer.block is not None else None
        if block is not None and block.decision is not None and block.encoder is None:
            decision = block.decision  # as a rule: decoding has no time to ask more
        else:
            decision = self._decision(call, block, layer, x)
        if decision.rows:
            call.check_rows(layer, x, decision.rows)
        routing = decision.of_tokens(x.shape[:-1].numel())
        if routing is None:
            raise ValueError(
                f"{layer.path} got an input of shape {list(x.shape)}, but its block decided for "
                f"{decision.routing.num_tokens} tokens: it sees other tokens than its block. Leave it out by "
                "exclude_modules, or use router_granularity='module'"
            )
        return routing

    def _decision(self, call: Call, block: Block | None, layer: AdaptedLinear, x: Tensor) -> Decision:
        site = self.site_of(layer)
        others = block is not None and _same_tokens(x, block.encoder)  # cross attention's keys and values
        if site == layer.path:
            mask = call.mask if block is None else call.encoder_mask if others else block.mask
            return self.decide(call, site, x, mask)
        if block is None:
            raise RuntimeError(
                f"{layer.path} ran before its block did; use router_granularity='module' for this model"
            )
        if others and self.config.routing_level == "token":
            if block.encoder_decision is None:
                block.encoder_decision = self.decide(call, site, x, call.encoder_mask)
            return block.encoder_decision
        return block.decision

    def decide(self, call: Call, site: str, hidden: Tensor, mask: Tensor | None) -> Decision:
        """The decision of a site's router for ``hidden`` ``[B, S, in]`` or ``[N, in]``."""
        rows = hidden.shape[0] if self.config.routing_level == "sequence" else 0
        if call.kept is None or not rows:
            decision = self._decide(call, site, hidden, mask)
            call.decisions.append(decision)
            return decision
        run = call.runs.get(site, 0)
        call.runs[site] = run + 1
        if (site, run) not in call.kept:
            call.kept[site, run] = self._decide(call, site, hidden, mask)
            call.decisions.append(call.kept[site, run])
        return _kept(call.kept[site, run], rows)

    def _decide(self, call: Call, site: str, hidden: Tensor, mask: Tensor | None) -> Decision:
        config, router = self.config, self[key_of(site)]
        mask, sizes = _fitted_once(call, mask, hidden), 1
        if config.routing_level == "sequence":
            read = _fitted_once(call, call.pool_mask, hidden) if call.pool_mask is not None else mask
            inputs, rows = pooled(hidden, read, config.router_pooling), hidden.shape[0]
            sizes = hidden.shape[1:-1].numel() if mask is None else mask.sum(1)
            mask = None
        else:
            inputs, rows = functional.as_rows(hidden), 0
            mask = None if mask is None else mask.reshape(-1)
        if isinstance(router, StaticRouter):
            return Decision(site, None, _static(router.weight, len(inputs), mask), mask, rows, sizes)
        logits, routing = self._route(router, inputs, mask, soft=call.mode == "soft")
        if call.mode == "teacher_forced":
            routing = _teacher_forced(routing, logits, call.domain_ids, config, mask)
        return Decision(site, logits, routing, mask, rows, sizes, inputs if call.collect else None)

    def _route(
        self, router: nn.Module, inputs: Tensor, mask: Tensor | None, *, soft: bool
    ) -> tuple[Tensor, Routing]:
        config = self.config
        first = router.hidden if isinstance(router, MLPRouter) else router
        want, experts = first.weight.shape[1], (router.out if first is not router else router).weight.shape[0]
        if inputs.shape[-1] != want:
            raise ValueError(
                f"a router made for inputs of width {want} got {list(inputs.shape)}; where a block's input "
                "has another width than its linears, use router_granularity='module'"
            )
        top_k = experts if config.top_k is None or soft else min(config.top_k, experts)
        flags: dict[str, Any] = {
            "score_func": config.score_func,
            "norm_topk_prob": config.norm_topk_prob and not soft,
            "mask": mask,
        }
        x = unit_mean_square(inputs) if config.router_norm else inputs
        if type(router) is LinearRouter and config.router_temperature == 1:
            return functional.linear_routing(x, router.weight, top_k, **flags)
        logits = router(x) / config.router_temperature
        return logits, functional.topk_routing(logits, top_k, **flags)


def block_hook(block: str, module: nn.Module) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    """A forward pre-hook for ``module`` that lets the routers of the call in progress decide for it."""
    names = list(inspect.signature(module.forward).parameters)

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = current()
        if call is None or (call.routers is None and call.ids is None):
            return
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        encoder, hidden = given.get("encoder_hidden_states"), _hidden_states(given)
        encoder = encoder if isinstance(encoder, Tensor) else None
        mask = call.encoder_mask if call.two_stacks and encoder is None else call.mask
        call.block = Block(None, None if hidden is None else hidden.shape[:-1].numel(), mask, encoder)
        if call.routers is not None:
            call.routers.enter_block(call, block, given)

    return hook


def _hidden_states(given: Mapping[str, Any]) -> Tensor | None:
    for value in (given.get("hidden_states"), *given.values()):
        if isinstance(value, Tensor) and value.dtype.is_floating_point and value.dim() >= 2:
            return value
    return None


def _same_tokens(x: Tensor, encoder: Tensor | None) -> bool:
    """Whether x is the encoder's states; reentrant checkpointing passes them on as another tensor."""
    if x is encoder or encoder is None or torch.compiler.is_compiling():
        return x is encoder
    return x.shape == encoder.shape and x.data_ptr() == encoder.data_ptr()


def unit_mean_square(x: Tensor) -> Tensor:
    """x / √(mean x² + 1e-6) over the last dimension, in float32 (float64 for float64)."""
    x = x.to(accumulation_dtype(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def fitted(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """``mask`` ``[B, M]`` for the tokens of ``hidden`` ``[B, S, in]``: its last S columns, rows repeated.

    ``None`` (all count) where it speaks of other tokens.
    """
    if mask is None or hidden.dim() != 3 or mask.dim() != 2:
        return None
    batch, length = hidden.shape[:2]
    if mask.shape[1] < length or batch % mask.shape[0]:
        return None
    mask = mask[:, mask.shape[1] - length :].to(hidden.device, torch.bool)
    return mask if mask.shape[0] == batch else mask.repeat_interleave(batch // mask.shape[0], 0)


def _fitted_once(call: Call, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    if mask is None:
        return None
    rows, device = hidden.shape[:-1], hidden.device
    for known, shape, where, result in call.fitted:
        if known is mask and shape == rows and where == device:
            return result
    call.fitted.append((mask, rows, device, fitted(mask, hidden)))
    return call.fitted[-1][3]


def pooled(hidden: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """One vector per row of ``[B, S, in]``: the mean of the tokens that count, or the last of them.

    ``[B, in]``, in float32 at least for the mean. A row without tokens gives zeros (mean) or its last (last).
    """
    if hidden.dim() == 2:
        return hidden
    if hidden.dim() > 3:
        hidden = hidden.flatten(1, -2)
    if how == "last":
        if mask is None:
            return hidden[:, -1]
        positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        last = (mask * positions).argmax(1)
        last = torch.where(mask.any(1), last, hidden.shape[1] - 1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    dtype = accumulation_dtype(hidden.dtype)
    if mask is None:
        return hidden.mean(1, dtype=dtype)
    total = hidden.masked_fill(~mask[..., None], 0).sum(1, dtype=dtype)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def _static(weight: Tensor, count: int, mask: Tensor | None) -> Routing:
    experts = weight.shape[0]
    indices = torch.arange(experts, device=weight.device).expand(count, experts)
    weights = (weight.float() / experts).expand(count, experts)
    if mask is not None:
        indices = torch.where(mask[:, None], indices, -1)
        weights = torch.where(mask[:, None], weights, 0.0)
    return Routing.from_indices(indices, weights, num_experts=experts)


def scores(logits: Tensor, score_func: str) -> Tensor:
    """Each expert's weight before selection: softmax over all, or sigmoid."""
    return logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()


def _teacher_forced(
    routing: Routing, logits: Tensor, domain_ids: Tensor, config: MoAConfig, mask: Tensor | None
) -> Routing:
    """Rows with a domain go to its expert alone, weighted with what the router gave it; others as routed."""
    count, experts = logits.shape
    ids = domain_ids.to(logits.device).repeat_interleave(count // len(domain_ids))
    labelled = ids >= 0 if mask is None else (ids >= 0) & mask
    expert = ids.clamp(min=0)[:, None]
    own = scores(logits, config.score_func).gather(1, expert)
    chosen = routing.weights
    if config.norm_topk_prob:
        own = torch.ones_like(own)
        if routing.top_k == 1:  # 1, too, whatever the logits: no gradient has to come back through the model
            chosen = chosen.detach()
    first = torch.arange(routing.top_k, device=logits.device) == 0
    indices = torch.where(labelled[:, None], torch.where(first, expert, -1), routing.indices)
    weights = torch.where(labelled[:, None], torch.where(first, own, 0.0), chosen)
    return Routing.from_indices(indices, weights, num_experts=experts)


def _kept(decision: Decision, rows: int) -> Decision:
    """A decision taken at prefill, for a step with as many rows or a multiple (each repeated).

    Beams of one prompt share its decision, and reordering exchanges beams of one prompt only, so that the
    decisions need not follow it.
    """
    if decision.rows == rows:
        return decision
    if rows % decision.rows:
        raise ValueError(
            f"this generation decided for {decision.rows} rows at its prompt, and a step has {rows}"
        )
    times, routing = rows // decision.rows, decision.routing
    routing = Routing.from_indices(
        routing.indices.repeat_interleave(times, 0),
        routing.weights.repeat_interleave(times, 0),
        num_experts=routing.num_experts,
    )
    return Decision(decision.site, None, routing, None, rows)


def mean_inputs(decisions: Sequence[Decision], norm: bool) -> dict[str, Tensor]:
    """What the routers of a collecting call read, as they saw it: the mean by site, padding aside."""
    found: dict[str, list[Tensor]] = {}
    for decision in decisions:
        if decision.inputs is not None:
            inputs = decision.inputs if decision.mask is None else decision.inputs[decision.mask]
            found.setdefault(decision.site, []).append(unit_mean_square(inputs) if norm else inputs.float())
    return {site: torch.cat(inputs).mean(0) for site, inputs in found.items()}
