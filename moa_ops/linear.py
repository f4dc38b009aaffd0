"""``MoALinear``: a frozen linear layer with a routed mixture of LoRA adapters on top."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_ops import functional, ops
from moa_ops.functional import SCORE_FUNCS
from moa_ops.reference import accumulation_dtype
from moa_ops.routing import Routing

ROUTING_LEVELS = ("token", "sequence")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Router(nn.Module):
    """The weight ``[E, in]`` of a linear router, in float32 whatever the model around it is converted to.

    ``.half()``, ``.to(torch.bfloat16)`` and the like move it to another device but leave it in float32,
    because routing decided in less sends tokens to the wrong experts; ``.double()`` does convert it.
    """

    def __init__(self, in_features: int, num_experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` does: uniform within ±1/√in."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[..., E]`` of x ``[..., in]``, in float32 (float64 for float64 x), also under autocast."""
        dtype = accumulation_dtype(x.dtype)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if functional.under_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x, weight)
        return F.linear(x, weight)

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        num_experts, in_features = self.weight.shape
        return f"in_features={in_features}, num_experts={num_experts}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device, torch.promote_types(tensor.dtype, torch.float32))
            return moved

        return super()._apply(at_least_float32, recurse)


class MoALinear(nn.Module):
    """A linear layer and, per token, a gated sum of k of its E LoRA adapters.

    ``y[t] = W x[t] + b + Σ_j w[t, j]·s·B_e (A_e x[t])`` with e the j-th of the experts chosen for token t.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``. Weight and bias are frozen.
        num_experts: E, the number of adapters.
        r: their rank.
        lora_alpha: their scale is s = lora_alpha / r, with ``use_rslora`` lora_alpha / √r.
        top_k: k, the number of experts per token.
        routing_level: "token", or "sequence": one decision per row of x ``[B, S, in]``, from its mean.
        score_func, norm_topk_prob: see :func:`moa_ops.topk_routing`.
        lora_dropout: probability with which inputs of the adapters (not of the router) drop out in training.
        device, dtype: of weight, bias and adapters; the router's weight is float32.

    Attributes:
        weight ``[out, in]``, bias ``[out]``: the frozen base; ``None`` where ``base_layer`` does its work.
        lora_A ``[E, r, in]``, lora_B ``[E, out, r]``: the adapters, lora_B zero at first, so that a fresh
            layer equals its base exactly (on CUDA up to the order of the base's own sums, which the library
            picks). They may be float32 under a bfloat16 or float16 base; CUDA's kernels then round them.
        router.weight ``[E, in]``: float32. ``router`` may be set to ``None`` where a routing is always given.

    Raises ``ValueError`` for r < 1, top_k outside [1, E], an unknown routing_level or score_func, and a
    dropout outside [0, 1). Equations: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), MoA (2403.03432).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_experts: int = 8,
        r: int = 16,
        lora_alpha: float = 32,
        top_k: int = 2,
        routing_level: str = "token",
        score_func: str = "softmax",
        norm_topk_prob: bool = True,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._wrap(
            base,
            num_experts,
            r,
            lora_alpha,
            top_k,
            routing_level,
            score_func,
            norm_topk_prob,
            lora_dropout,
            use_rslora,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        num_experts: int = 8,
        r: int = 16,
        lora_alpha: float = 32,
        top_k: int = 2,
        routing_level: str = "token",
        score_func: str = "softmax",
        norm_topk_prob: bool = True,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> MoALinear:
        """A mixture over an existing layer, whose parameters it shares and freezes; nothing is copied.

        linear: an ``nn.Linear``, whose weight and bias become this layer's, or any module with
            ``in_features`` and ``out_features`` that maps ``[..., in]`` to ``[..., out]`` (a quantised
            linear, for example), which is called as ``base_layer``.
        dtype: of the adapters; by default that of the weight, and torch's default where that is not floating.

        The other arguments are those of the class. Raises ``TypeError`` for a module without the two
        attributes.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._wrap(
            linear,
            num_experts,
            r,
            lora_alpha,
            top_k,
            routing_level,
            score_func,
            norm_topk_prob,
            lora_dropout,
            use_rslora,
            dtype,
        )
        return layer

    def _wrap(
        self,
        base: nn.Module,
        num_experts: int,
        r: int,
        lora_alpha: float,
        top_k: int,
        routing_level: str,
        score_func: str,
        norm_topk_prob: bool,
        lora_dropout: float,
        use_rslora: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (hasattr(base, "in_features") and hasattr(base, "out_features")):
            raise TypeError(
                f"from_linear wraps modules with in_features and out_features, such as nn.Linear; got "
                f"{type(base).__name__}"
            )
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        if r < 1:
            raise ValueError(f"r, the rank of the adapters, must be at least 1, got {r}")
        functional.check_routing_options(num_experts, top_k, score_func)
        if routing_level not in ROUTING_LEVELS:
            raise ValueError(f"routing_level must be one of {list(ROUTING_LEVELS)}, got {routing_level!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout}")
        if top_k == 1 and norm_topk_prob and num_experts > 1:
            warnings.warn(
                "top_k=1 with norm_topk_prob=True makes every gate weight exactly 1, so the output teaches "
                "the router nothing; pass norm_topk_prob=False, or train the router by a loss on its logits",
                stacklevel=3,
            )
        self.in_features, self.out_features = base.in_features, base.out_features
        self.num_experts, self.r, self.top_k = num_experts, r, top_k
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.routing_level, self.score_func, self.norm_topk_prob = routing_level, score_func, norm_topk_prob
        self.lora_dropout = lora_dropout

        device, dtype = self._wrap_base(base, dtype)
        self.lora_A = nn.Parameter(torch.empty(num_experts, r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(num_experts, self.out_features, r, device=device, dtype=dtype))
        self.router = Router(self.in_features, num_experts, device)
        self.reset_parameters()

    def _wrap_base(
        self, base: nn.Module, dtype: torch.dtype | None
    ) -> tuple[torch.device | None, torch.dtype]:
        """Freezes the base and shares its parameters, or keeps it whole; device and dtype for adapters."""
        base.requires_grad_(False)
        weight = getattr(base, "weight", None)
        # Only what certainly computes F.linear is replaced by its parameters; anything else is called.
        plain = (
            type(base) is nn.Linear
            and type(weight) is nn.Parameter
            and "forward" not in vars(base)
            and not any(vars(base)[hooks] for hooks in _HOOKS)
        )
        self.register_module("base_layer", None if plain else base)
        self.register_parameter("weight", base.weight if plain else None)
        self.register_parameter("bias", base.bias if plain else None)
        device = weight.device if isinstance(weight, Tensor) else None
        if dtype is None:
            floating = (
                isinstance(weight, Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
            )
            dtype = weight.dtype if floating else torch.get_default_dtype()
        return device, dtype

    def reset_parameters(self) -> None:
        """Fresh adapters and router: A uniform within ±1/√in, B zero (as LoRA), the router as ``nn.Linear``.

        The base is left as it is.
        """
        nn.init.kaiming_uniform_(self.lora_A.view(-1, self.in_features), a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.router is not None:
            self.router.reset_parameters()

    def forward(self, x: Tensor, routing: Routing | None = None, mask: Tensor | None = None) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in x's dtype (autocast's under autocast).

        routing: a decision made elsewhere for the tokens of x; without it the layer's own router decides.
        mask: bool, the shape of x without its last dimension; tokens where it is False (padding) get no
            adapter and count nowhere. Not together with ``routing``, which says the same by index -1.
        """
        if x.size(-1) != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}] (in_features), got shape {list(x.shape)}")
        # At one token the mixture is some 20 µs of kernels, and beside weights that have just swept the cache
        # every Python object touched is a miss: so the common cases come first, read little, and check
        # nothing that the operators check.
        modules = self._modules
        if (
            mask is None
            and modules["base_layer"] is None
            and not (self.lora_dropout and self.training)
            and "parametrizations" not in modules
        ):
            parameters = self._parameters
            weight = parameters["weight"]
            base_and_lora = (weight, parameters["bias"], parameters["lora_A"], parameters["lora_B"])
            if x.dtype is not weight.dtype or functional.under_autocast(x):
                pass
            elif routing is not None:
                return functional.moa_linear(x, *base_and_lora, routing, scaling=self.scaling)
            elif (router := modules["router"]) is not None and self.routing_level == "token":
                layer = (
                    x,
                    *base_and_lora,
                    router._parameters["weight"],
                    self.top_k,
                    SCORE_FUNCS[self.score_func],
                    self.norm_topk_prob,
                    self.scaling,
                )
                if torch.is_grad_enabled() or x.dtype is torch.float64:
                    return functional.routed_moa_linear(*layer)
                return ops.routed_linear(*layer)
        return self._forward_in_parts(x, routing, mask)

    def _forward_in_parts(self, x: Tensor, routing: Routing | None, mask: Tensor | None) -> Tensor:
        if self.base_layer is None and x.dtype != self.weight.dtype and not functional.under_autocast(x):
            raise TypeError(f"x is {x.dtype}, the layer's weight {self.weight.dtype}; convert one with .to()")
        if routing is None:
            _, routing = self.route(x, mask)
        elif mask is not None:
            raise ValueError(
                "give either routing or mask: a routing says by index -1 which tokens get no adapter"
            )
        dropped = self.lora_dropout > 0 and self.training
        adapters = {"lora_A": self.lora_A, "lora_B": self.lora_B, "routing": routing, "scaling": self.scaling}
        if self.base_layer is None and not dropped:
            return functional.moa_linear(x, self.weight, self.bias, **adapters)
        base = F.linear(x, self.weight, self.bias) if self.base_layer is None else self.base_layer(x)
        if dropped:
            x = F.dropout(x, self.lora_dropout)
        return functional.segment_lora(x.to(base.dtype), **adapters, base=base)

    def route(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """The decision of the layer's own router, for losses, for inspection, or to share with other layers.

        Returns the logits, float32 ``[T, E]`` or at sequence level ``[B, E]``, and the :class:`Routing` of
        all T tokens; both are differentiable. ``layer(x)`` equals ``layer(x, routing=layer.route(x)[1])``.
        """
        if self.router is None:
            raise ValueError(
                "this layer has no router (router is None); give it a routing: layer(x, routing=...)"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(
                f"mask must be bool of shape {list(x.shape[:-1])} (x without its last dimension), "
                f"got {mask.dtype} of shape {list(mask.shape)}"
            )
        flags: dict[str, Any] = {"score_func": self.score_func, "norm_topk_prob": self.norm_topk_prob}
        if self.routing_level == "token":
            return functional.linear_routing(x, self.router.weight, self.top_k, mask=mask, **flags)
        if x.dim() != 3:
            raise ValueError(f"routing_level='sequence' takes x [B, S, in], got shape {list(x.shape)}")
        dtype = accumulation_dtype(x.dtype)
        if mask is None:
            pooled, rows = x.mean(1, dtype=dtype), None
        else:
            total = x.masked_fill(~mask[..., None], 0).sum(1, dtype=dtype)
            pooled, rows = total / mask.sum(1, keepdim=True).clamp(min=1), mask.any(1)
        logits, routing = functional.linear_routing(
            pooled, self.router.weight, self.top_k, mask=rows, **flags
        )
        return logits, routing.repeat(x.shape[1], mask)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        settings = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "num_experts": self.num_experts,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "top_k": self.top_k,
            "routing_level": repr(self.routing_level),
            "score_func": repr(self.score_func),
            "norm_topk_prob": self.norm_topk_prob,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
        }
        if self.base_layer is not None:
            del settings["bias"]
        return ", ".join(f"{name}={value}" for name, value in settings.items())
