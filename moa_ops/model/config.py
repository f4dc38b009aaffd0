"""``MoAConfig``: where adapters go, how large they are, and how their routers decide."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from moa_ops.functional import SCORE_FUNCS
from moa_ops.linear import ROUTING_LEVELS

GRANULARITIES = ("module", "block", "model")
ROUTER_TYPES = ("linear", "mlp", "prototype", "static")
POOLINGS = ("mean", "last")
ROUTING_FIELDS = (
    "top_k",
    "routing_level",
    "score_func",
    "norm_topk_prob",
    "router_temperature",
    "router_pooling",
    "router_domain_loss_coef",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_mutual_information_coef",
)


@dataclass(frozen=True)
class MoAConfig:
    """Settings of a mixture of LoRAs in a model.

    Adapters (PEFT's names and meanings; ``add_adapter`` may override them for one adapter):
        r, lora_alpha, use_rslora: rank; scale lora_alpha / r, with rsLoRA lora_alpha / √r.
        lora_dropout: probability with which inputs of adapters (not of routers) drop out in training.
        target_modules: names (a module is chosen if its path is the name or ends in ``.name``), a regular
            expression that matches whole paths, or "all-linear": every linear but the output embedding.
        exclude_modules: the same forms; taken away from the chosen ones.
        rank_pattern, alpha_pattern: r and lora_alpha by name or regular expression of the end of the path.
        num_experts: so many fresh adapters "expert_0", "expert_1", ... are there from the start.
        autocast_adapter_dtype: adapters are float32 where the base is float16 or bfloat16.

    Routing (all but the first three can be changed later by ``update_routing``):
        router_granularity: "block": one decision per repeated block, read from its input; "module": one per
            linear, from its own input; "model": one for all, from the first block's input.
        router_type: "linear"; "mlp" with ``router_hidden_size`` hidden units; "prototype": |v·x| with v the
            top right singular vector of B A (Arrow, arXiv 2405.11157), nothing to train, per module;
            "static": the mean of all adapters times learned or fixed weights, whatever the input.
        router_norm: routers read inputs scaled to unit mean square.
        routing_level: "sequence": one decision per row, from its tokens' "mean" or the "last" token
            (``router_pooling``), padding aside; "token": one per token.
        top_k: adapters per decision, no more than there are; ``None``: all of them (dense).
        score_func, norm_topk_prob: see :func:`moa_ops.topk_routing`; logits are first divided by
            ``router_temperature``.

    Losses: coefficients of the parts in ``out.moa_losses``: domain cross-entropy, load balance, z, and the
        mutual information of domain and expert (see :mod:`moa_ops.model.losses`).
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | Sequence[str] = ("q_proj", "v_proj")
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    num_experts: int = 0
    autocast_adapter_dtype: bool = True
    router_granularity: str = "block"
    router_type: str = "linear"
    router_hidden_size: int = 64
    router_norm: bool = True
    top_k: int | None = 1
    routing_level: str = "sequence"
    router_pooling: str = "mean"
    score_func: str = "softmax"
    norm_topk_prob: bool = False
    router_temperature: float = 1.0
    router_domain_loss_coef: float = 1.0
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    router_mutual_information_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if not self.target_modules:
            raise ValueError("target_modules is empty; name the linears to adapt, or 'all-linear'")
        _whole("r", self.r, 1)
        _whole("num_experts", self.num_experts, 0)
        _whole("router_hidden_size", self.router_hidden_size, 1)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        if not (math.isfinite(self.router_temperature) and self.router_temperature > 0):
            raise ValueError(f"router_temperature must be positive and finite, got {self.router_temperature}")
        for name, allowed in (
            ("router_granularity", GRANULARITIES),
            ("router_type", ROUTER_TYPES),
            ("routing_level", ROUTING_LEVELS),
            ("router_pooling", POOLINGS),
            ("score_func", tuple(SCORE_FUNCS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        for pattern, rank in self.rank_pattern.items():
            _whole(f"rank_pattern[{pattern!r}]", rank, 1)
        if self.router_type == "prototype" and self.router_granularity != "module":
            raise ValueError(
                "router_type='prototype' compares each linear's input with that linear's adapters: it needs "
                f"router_granularity='module', got {self.router_granularity!r}"
            )

    def with_routing(self, **changes: Any) -> MoAConfig:
        """A copy with other settings of routing or losses. Raises ``ValueError`` for any other field."""
        wrong = sorted(set(changes) - set(ROUTING_FIELDS))
        if wrong:
            raise ValueError(
                f"{wrong} cannot be changed in a model that is built; these can: {list(ROUTING_FIELDS)}"
            )
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        values = asdict(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoAConfig:
        """The inverse of :meth:`to_dict`. Raises ``ValueError`` for an unknown field."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings {unknown}; MoAConfig has {[f.name for f in fields(cls)]}")
        return cls(**values)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
