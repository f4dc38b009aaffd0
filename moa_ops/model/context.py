"""What one forward pass was asked to do and what its routers said: never kept on modules.

A :class:`Call` lives in a thread-local while its forward pass runs; nested calls and other threads have their
own. A recomputation under gradient checkpointing happens in the backward, when the call is over:
:func:`checkpointed` hands the call to it again. (A thread-local and no ``contextvars.ContextVar``, because
``torch.compile`` traces the one and not the other.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moa_ops.routing import Routing

if TYPE_CHECKING:
    from moa_ops.model.inspection import RoutingRecord
    from moa_ops.model.layer import AdaptedLinear
    from moa_ops.model.routers import RouterSet


class _Local(threading.local):
    call: Call | None = None
    disabled: tuple[nn.Module, ...] = ()
    rotations: tuple[tuple[nn.Module, Rotation], ...] = ()
    records: tuple[tuple[nn.Module, RoutingRecord], ...] = ()


_local = _Local()


def current() -> Call | None:
    """The call in progress on this thread."""
    return _local.call


@contextmanager
def use(call: Call | None) -> Iterator[Call | None]:
    """Makes ``call`` the one in progress."""
    before = _local.call
    _local.call = call
    try:
        yield call
    finally:
        _local.call = before


@contextmanager
def recording(model: nn.Module, record: RoutingRecord) -> Iterator[RoutingRecord]:
    """Within, on this thread, ``record`` observes what the routers of ``model`` decide."""
    before = _local.records
    _local.records = (*before, (model, record))
    try:
        yield record
    finally:
        _local.records = before


def records_of(model: nn.Module) -> list[RoutingRecord]:
    """What observes ``model`` on this thread."""
    return [record for other, record in _local.records if other is model]


class Rotation:
    """LoRA Switch (Multi-LoRA Composition, 2402.16843): another adapter after every ``every`` passes."""

    def __init__(self, experts: Sequence[int], every: int) -> None:
        self.experts, self.every, self.passes = experts, every, 0

    def next(self) -> int:
        """The adapter of the next pass."""
        expert = self.experts[self.passes // self.every % len(self.experts)]
        self.passes += 1
        return expert


@contextmanager
def rotating(model: nn.Module, rotation: Rotation) -> Iterator[None]:
    """Within, on this thread, ``rotation`` says which adapter each pass of ``model`` uses."""
    before = _local.rotations
    _local.rotations = (*before, (model, rotation))
    try:
        yield
    finally:
        _local.rotations = before


def rotation_of(model: nn.Module) -> Rotation | None:
    """The innermost rotation of ``model`` on this thread."""
    return next((r for other, r in reversed(_local.rotations) if other is model), None)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within, on this thread, ``model`` runs without adapters."""
    before = _local.disabled
    _local.disabled = (*before, model)
    try:
        yield
    finally:
        _local.disabled = before


def is_disabled(model: nn.Module) -> bool:
    """Whether ``model`` runs without adapters on this thread."""
    return any(other is model for other in _local.disabled)


def check_not_recomputing(path: str) -> None:
    """Raises ``RuntimeError`` where a backward recomputes ``path`` and its call is not known any more."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{path} is recomputed in a backward pass, outside of the model's forward, and cannot know which "
            "adapters it had: switch checkpointing on by model.gradient_checkpointing_enable(), or pass the "
            "checkpointed function through moa_ops.model.checkpointed(torch.utils.checkpoint.checkpoint)"
        )


# ------------------------------------------------------------------------------------------------- decisions


@dataclass
class Decision:
    """What one router decided at one place.

    logits: ``[N, E]`` for N rows of the batch or N tokens; ``None`` for a static router.
    routing: of the N.
    mask: ``[N]`` bool, False where padding; ``None``: none is.
    rows: B at sequence level (N = B), 0 at token level.
    sizes: how many tokens each of the N stands for, ``[N]`` or one number.
    inputs: ``[N, in]`` what the router read, where the call collects it.
    """

    site: str
    logits: Tensor | None
    routing: Routing
    mask: Tensor | None
    rows: int
    sizes: Tensor | int = 1
    inputs: Tensor | None = None
    expanded: dict[int, Routing] = field(default_factory=dict)  # by number of tokens

    def __post_init__(self) -> None:
        self.expanded[self.routing.num_tokens] = self.routing

    def of_tokens(self, tokens: int) -> Routing | None:
        """The routing of ``tokens`` tokens in batch-major order, or ``None`` if they are not its own."""
        known = self.expanded.get(tokens)
        if known is None and self.rows and tokens % self.rows == 0:
            known = self.expanded[tokens] = self.routing.repeat(tokens // self.rows)
        return known


@dataclass
class Block:
    """A block as it runs: its decision, which of its tokens count, and what its cross attention sees.

    tokens: how many it has, where that is known.
    """

    decision: Decision | None
    tokens: int | None = None
    mask: Tensor | None = None
    encoder: Tensor | None = None
    encoder_decision: Decision | None = None


@dataclass(eq=False)
class Call:
    """One forward pass.

    routers: decide, if neither ``single`` nor ``ids`` does; ``None``: no adapters at all.
    single: the adapter of every token.
    ids: ``[B]`` adapter of each row, -1 for none.
    mode, domain_ids: "routed", "teacher_forced" (rows with a domain go to its expert) or "soft".
    mask, encoder_mask, pool_mask: ``[B, S]``: tokens that count, of the model's input and of an encoder's,
        and those a router may read. ``two_stacks``: there are an encoder's blocks beside a decoder's.
    kept: decisions that hold beyond this pass (a generation's, taken at prefill), by site and, as a shared
        block runs several times in a pass, by how often it ran before; ``runs`` counts that.
    grad: whether the pass as a whole records gradients.
    rotation: sets ``single`` anew for every pass. collect: decisions keep what their routers read.
    fitted: masks, what they were fitted to, and the result: blocks of one width ask for the same.
    """

    num_experts: int
    routers: RouterSet | None = None
    single: int | None = None
    ids: Tensor | None = None
    mode: str = "routed"
    domain_ids: Tensor | None = None
    mask: Tensor | None = None
    encoder_mask: Tensor | None = None
    two_stacks: bool = False
    pool_mask: Tensor | None = None
    kept: dict[tuple[str, int], Decision] | None = None
    runs: dict[str, int] = field(default_factory=dict)
    rotation: Rotation | None = None
    collect: bool = False
    records: list[RoutingRecord] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    block: Block | None = None
    by_model: dict[str, Decision] = field(default_factory=dict)
    by_tokens: dict[int, Routing] = field(default_factory=dict)
    fitted: list[tuple[Tensor, torch.Size, torch.device, Tensor | None]] = field(default_factory=list)
    grad: bool = field(default_factory=torch.is_grad_enabled)

    def routing(self, layer: AdaptedLinear, x: Tensor) -> Routing | None:
        """The routing of x ``[..., in]`` in ``layer``; ``None``: no adapters."""
        if self.ids is not None:
            self.check_rows(layer, x, self.ids.shape[0])
            return self.by_id(x)
        if self.routers is None:
            return None
        return self.routers.routing(self, layer, x)

    def check_rows(self, layer: AdaptedLinear, x: Tensor, rows: int) -> None:
        """Raises ``ValueError`` unless x ``[..., in]`` is made of equal parts, one per row of the batch.

        Experts that are linears get tokens gathered from all rows, in a flat input of any length.
        """
        fits = x.shape[:-1].numel() % rows == 0
        if x.dim() > 2:
            fits = x.shape[0] % rows == 0
        elif layer.block is not None and self.block is not None and self.block.tokens is not None:
            block, encoder = self.block, self.block.encoder
            known = [block.tokens] if encoder is None else [block.tokens, encoder.shape[:-1].numel()]
            fits = fits and (x.shape[0] in known or (x.shape[0] == rows and not layer.in_list))
        if not fits:
            raise ValueError(
                f"{layer.path} got an input of shape {list(x.shape)}, which cannot be shared out over {rows} "
                "rows of the batch: it sees other tokens than its block. Leave it out by exclude_modules, or "
                "route by router_granularity='module' and routing_level='token'"
            )

    def all_to_one(self, x: Tensor) -> Routing:
        """Every token of x to expert 0 of 1."""
        tokens = x.shape[:-1].numel()
        if tokens not in self.by_tokens:
            indices = torch.zeros(tokens, dtype=torch.int64, device=x.device)
            self.by_tokens[tokens] = Routing.from_indices(indices, num_experts=1)
        return self.by_tokens[tokens]

    def by_id(self, x: Tensor) -> Routing:
        """Every row of x to its adapter; where there are more rows than ids (beams), each id is repeated."""
        tokens = x.shape[:-1].numel()
        if tokens not in self.by_tokens:
            ids = self.ids.to(x.device).repeat_interleave(tokens // self.ids.shape[0])
            self.by_tokens[tokens] = Routing.from_indices(ids, num_experts=self.num_experts)
        return self.by_tokens[tokens]

    def observe(self) -> None:
        """Shows the decisions so far to the records that wait for them."""
        for record in self.records:
            record.observe(self)

    def begin_step(self, mask: Tensor | None, encoder_mask: Tensor | None) -> None:
        """Another forward pass within the same call: a generation's next token."""
        self.observe()
        self.mask = mask if mask is not None else self.mask
        self.encoder_mask = encoder_mask if encoder_mask is not None else self.encoder_mask
        self.block = None
        self.by_model.clear()
        self.runs.clear()
        self.decisions.clear()
        self.fitted.clear()

    def snapshot(self) -> Call:
        """This moment of the call, for a recomputation: what is decided later does not change it."""
        return replace(self, decisions=[], by_model=dict(self.by_model), kept=None, fitted=[])


# --------------------------------------------------------------------------------------------- checkpointing


def checkpointed(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint(function, *args)`` such that the recomputation finds the call its forward belonged to.

    What crosses the border of the region does so as its arguments and results, so that gradients do too, also
    with ``use_reentrant=True``: gate weights decided before it enter, logits decided in it leave.
    """

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current() or Call(0)  # without one, the base alone: also when it is recomputed
        snapshot = call.snapshot()
        weights = [d.routing.weights for d in _decisions(snapshot.block)]
        made: list[Decision] = []
        shape: list[Any] = []

        def resumed(*inputs: Any, **named: Any) -> tuple[Any, ...]:
            given, inner = inputs[: len(weights)], inputs[len(weights) :]
            first = not shape
            with use(call if first else snapshot) as here:
                before, here.decisions = here.decisions, []
                try:
                    with _with_weights(here, given):
                        out = function(*inner, **named)
                    decided = here.decisions
                finally:
                    here.decisions = before
            if first:
                made.extend(decided)
                shape.append(type(out))
            return *(out if isinstance(out, tuple) else (out,)), *(d.logits for d in decided)

        results = checkpoint(resumed, *weights, *args, **kwargs)
        count = len(results) - len(made)  # a static router's logits are None
        for decision, logits in zip(made, results[count:], strict=True):
            call.decisions.append(replace(decision, logits=logits))
        return results[:count] if issubclass(shape[0], tuple) else results[0]

    run.moa_ops_checkpointed = True
    return run


def _decisions(block: Block | None) -> list[Decision]:
    if block is None:
        return []
    return [d for d in (block.decision, block.encoder_decision) if d is not None]


@contextmanager
def _with_weights(call: Call, weights: Sequence[Tensor]) -> Iterator[None]:
    """Within, the block's decisions have these weights (the same numbers, as the region's own inputs)."""
    before = call.block
    if before is not None:
        given = iter(weights)
        call.block = replace(
            before,
            decision=before.decision and _reweighted(before.decision, next(given)),
            encoder_decision=before.encoder_decision and _reweighted(before.encoder_decision, next(given)),
        )
    try:
        yield
    finally:
        call.block = before


def _reweighted(decision: Decision, weights: Tensor) -> Decision:
    routing = decision.routing
    routing = Routing(weights, routing.indices, routing.expert_offsets, routing.order, routing.num_experts)
    return Decision(decision.site, decision.logits, routing, decision.mask, decision.rows)


def wrap_checkpointing(model: nn.Module) -> None:
    """Makes the checkpointing that modules are set up for hand the call to the recomputation.

    Known are transformers' (as ``gradient_checkpointing_enable`` sets it) and torch's ``CheckpointWrapper``,
    which accelerate uses under FSDP.
    """
    for module in model.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            function = module.__dict__.get(name)
            if function is not None and not getattr(function, "moa_ops_checkpointed", False):
                setattr(module, name, checkpointed(function))
