"""``MoAModel``: any ``nn.Module`` with a mixture of named LoRA adapters in its linears."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moa_ops.model import context, deciding, generation, state
from moa_ops.model.adapters import UNTRAINABLE, AdaptedModel
from moa_ops.model.combining import Combining
from moa_ops.model.config import MoAConfig
from moa_ops.model.context import Call
from moa_ops.model.inspection import RoutingRecord
from moa_ops.model.losses import router_losses
from moa_ops.model.storage import Storage

ROUTING_MODES = ("routed", "teacher_forced", "soft")


class MoAModel(Combining, Storage, AdaptedModel):
    """A model whose chosen linears are mixtures of named LoRA adapters.

    The linears of ``base_model`` are replaced in place by :class:`~moa_ops.model.layer.AdaptedLinear`, which
    share their weights; nothing of the base is copied, and :meth:`unload` puts the very same modules back.
    What this class does not have is looked up in ``base_model`` (``config``, ``device``,
    ``gradient_checkpointing_enable``, ...).

    Attributes:
        base_model: the model, in which adapters act only while this class runs it.
        config: the :class:`~moa_ops.model.config.MoAConfig`.
        adapters: names, in the order of expert ids.
        active_adapter: the one that :meth:`set_adapter` set, or ``None``.
        routers: one per place that decides, by its path.
    """

    accepts_loss_kwargs = False  # transformers.Trainer then scales the whole loss under gradient accumulation

    def __init__(self, base_model: nn.Module, config: MoAConfig) -> None:
        super().__init__(base_model, config)
        self._hooks[""] = base_model.register_forward_pre_hook(self._step, with_kwargs=True)
        self.forward = _with_signature(self)
        self.register_state_dict_post_hook(state.leave_out_frozen)
        self.register_load_state_dict_post_hook(state.nothing_missing)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # ------------------------------------------------------------------------------------------------ running

    def forward(
        self,
        *args: Any,
        labels: Any = None,
        domain_ids: Tensor | None = None,
        routing_mode: str = "routed",
        adapter_names: Sequence[str] | None = None,
        adapter_ids: Tensor | None = None,
        routing_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the base model with its arguments; which adapters apply is said by these, in this order:

        adapter_names / adapter_ids: by id; a name per row ("__base__": none), or ids ``[B]``, -1 for none.
        the adapter set by :meth:`set_adapter`.
        routing_mode: "routed"; "teacher_forced": rows go to the expert ``domain_ids`` names, weighted with
            what the router gave it; "soft": all experts with their probabilities.

        domain_ids: ``[B]`` expert index of each row, for the router's loss; negative where unknown.
        routing_mask: ``[B, S]`` bool, tokens that a router at sequence level may read; by default those of
            ``attention_mask``.

        Returns what the base model returns. If that is a ``ModelOutput``, it also has ``moa_losses``, a dict
        of the parts (already multiplied by their coefficients) whose sum is ``loss``, and
        ``moa_router_logits``, a dict of logits by place: ``[B, E]``, at token level ``[B·S, E]``. Of a tuple
        that begins with a loss, the loss becomes that sum.
        """
        call = self._call(
            self._bound(args, kwargs),
            domain_ids,
            routing_mode,
            adapter_names,
            adapter_ids,
            routing_mask,
        )
        if labels is not None:
            kwargs["labels"] = labels
        if call.grad and not torch.compiler.is_compiling():
            context.wrap_checkpointing(self.base_model)
        with context.use(call):
            out = self.base_model(*args, **kwargs)
        call.observe()
        return self._with_losses(out, call, labels is not None)

    def _call(
        self,
        given: Mapping[str, Any],
        domain_ids: Tensor | None = None,
        routing_mode: str = "routed",
        adapter_names: Sequence[str] | None = None,
        adapter_ids: Tensor | None = None,
        routing_mask: Tensor | None = None,
    ) -> Call:
        """What the arguments ask for; ``given`` are those of the base model."""
        if routing_mode not in ROUTING_MODES:
            raise ValueError(f"routing_mode must be one of {list(ROUTING_MODES)}, got {routing_mode!r}")
        call = Call(len(self.adapters), domain_ids=domain_ids, mode=routing_mode, pool_mask=routing_mask)
        call.mask, call.encoder_mask = self._masks(given)
        call.two_stacks = self._has_encoder()
        if adapter_names is not None:
            if adapter_ids is not None:
                raise ValueError("give adapter_names or adapter_ids, not both")
            adapter_ids = self.ids_of(adapter_names)
        call.records = context.records_of(self)
        if not self.adapters or self.merged is not None or context.is_disabled(self):
            return call
        if adapter_ids is not None:
            call.ids = adapter_ids
        elif (rotation := context.rotation_of(self)) is not None:
            call.rotation = rotation
        elif self.active_adapter is not None:
            call.single = self.expert_id(self.active_adapter)
        else:
            call.routers = self.routers
            if routing_mode == "teacher_forced" and domain_ids is None:
                raise ValueError("routing_mode='teacher_forced' needs domain_ids, the expert of each row")
            self._warn_untrainable(call)
        return call

    def _with_losses(self, out: Any, call: Call, labelled: bool) -> Any:
        parts = router_losses(call.decisions, self.moa_config, call.domain_ids)
        if isinstance(out, tuple) and labelled and parts:  # return_dict=False: the loss comes first
            return out[0] + sum(parts.values()), *out[1:]
        if not hasattr(out, "keys"):
            return out
        loss = getattr(out, "loss", None)
        losses = {} if loss is None else {"lm": loss}
        losses |= {name: part if loss is None else part.to(loss.device) for name, part in parts.items()}
        if parts:
            out["loss"] = sum(losses.values())
        out.moa_losses = losses
        out.moa_router_logits = {d.site: d.logits for d in call.decisions if d.logits is not None}
        return out

    def _bound(self, args: tuple, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        if not args:
            return kwargs
        names = list(inspect.signature(self.base_model.forward).parameters)
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _masks(self, given: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Masks of the tokens themselves and of an encoder's, ``[B, S]``; ``None`` where all count."""
        mask, decoder = (_mask(given.get(name)) for name in ("attention_mask", "decoder_attention_mask"))
        if self._has_encoder():
            return decoder, mask
        return mask, _mask(given.get("encoder_attention_mask"))

    def _has_encoder(self) -> bool:
        return getattr(getattr(self.base_model, "config", None), "is_encoder_decoder", False)

    def _step(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before every forward of the base model: a step of a generation has masks of its own."""
        call = context.current()
        if call is None:
            return
        if call.kept is not None:
            call.begin_step(*self._masks(self._bound(args, kwargs)))
        if call.rotation is not None:
            call.single = call.rotation.next()

    def record_routing(self) -> AbstractContextManager[RoutingRecord]:
        """``with model.record_routing() as record``: within, on this thread, ``record`` counts decisions."""
        return context.recording(self, RoutingRecord(list(self.adapters), self.moa_config.score_func))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, on this thread, the model is its base, bit for bit."""
        with context.disabled(self):
            yield

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        adapter_ids: Tensor | None = None,
        routing_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's ``generate``, routed: see :func:`moa_ops.model.generation.generate`."""
        return generation.generate(self, args, kwargs, adapter_names, adapter_ids, routing_mask)

    def switch_adapters(self, adapter_names: Sequence[str], every: int = 1) -> AbstractContextManager[None]:
        """Within, on this thread, adapters take turns: another one after every ``every`` passes.

        A pass is a forward of the base model: a generated token, a step of a diffusion sampler (LoRA Switch,
        arXiv 2402.16843).
        """
        experts = [self.expert_id(name) for name in adapter_names]
        if not experts or every < 1:
            raise ValueError(f"switching needs adapters and every >= 1, got {list(adapter_names)}, {every}")
        return context.rotating(self, context.Rotation(experts, every))

    @torch.no_grad()
    def init_routers(self, prompts: Mapping[str, Mapping[str, Any]], margin: float = 4.0) -> None:
        """Starts linear routers from examples: a row points to the mean of what its router reads.

        prompts: for every adapter, arguments of the base model (``input_ids``, ``attention_mask``, ...) that
            hold a batch of texts for it; they run through that adapter.
        margin: how much more an adapter's own mean gets than others, in logits, on average.
        """
        if set(prompts) != set(self.adapters):
            raise ValueError(f"prompts must be given for all of {self.adapters}, got {sorted(prompts)}")
        if self.moa_config.router_type != "linear":
            raise ValueError(
                f"only linear routers start from examples, these are {self.moa_config.router_type!r}"
            )
        means: dict[str, list[Tensor]] = {}
        for expert, name in enumerate(self.adapters):
            batch = prompts[name]
            rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
            ids = torch.full((rows,), expert)
            call = self._call(batch, domain_ids=ids, routing_mode="teacher_forced")
            if call.routers is None:
                raise ValueError("routers cannot be started while an adapter is set: set_adapter(None) first")
            call.collect = True
            with context.use(call):
                self.base_model(**batch)
            for site, mean in deciding.mean_inputs(call.decisions, self.moa_config.router_norm).items():
                means.setdefault(site, []).append(mean)
        for site, rows in means.items():
            self.routers[deciding.key_of(site)].separate(torch.stack(rows), margin)

    def _warn_untrainable(self, call: Call) -> None:
        if torch.compiler.is_compiling() or not (call.grad and self._renormalised_top_1()):
            return
        unlabelled = call.mode != "soft" and call.domain_ids is None and len(self.adapters) > 1
        if unlabelled and any(p.requires_grad for p in self.routers.parameters()):
            warnings.warn(UNTRAINABLE, stacklevel=4)


def get_moa_model(base_model: nn.Module, config: MoAConfig) -> MoAModel:
    """Wraps a model in place: its chosen linears take adapters from now on.

    Raises ``ValueError``, with near names, where ``config.target_modules`` chooses no linear.
    """
    return MoAModel(base_model, config)


def _mask(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _with_signature(model: MoAModel) -> types.MethodType:
    """``forward`` with the parameters of the base model's in its signature, for tools that look there.

    ``transformers.Trainer`` drops the columns of a data set that the signature does not name.
    """
    own = MoAModel.forward
    function = types.FunctionType(own.__code__, own.__globals__, own.__name__, None, own.__closure__)
    function.__kwdefaults__, function.__doc__ = own.__kwdefaults__, own.__doc__
    base = list(inspect.signature(model.base_model.forward).parameters.values())
    names = {p.name for p in base}
    rest = [p for p in base if p.kind is p.VAR_KEYWORD]
    extra = [
        p
        for p in inspect.signature(own).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in names
    ]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.kind is p.POSITIONAL_ONLY for p in base):
        first = first.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    function.__signature__ = inspect.Signature([first, *(p for p in base if p not in rest), *extra, *rest])
    return types.MethodType(function, model)
