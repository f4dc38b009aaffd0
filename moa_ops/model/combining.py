"""Adapters of a :class:`~moa_ops.model.MoAModel` combined: into a new adapter, or into the base model.

The mathematics is in :mod:`moa_ops.model.merging`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moa_ops.model import context
from moa_ops.model.adapter import LoraAdapter, LoraFactors
from moa_ops.model.context import Call
from moa_ops.model.layer import AdaptedLinear
from moa_ops.model.merging import learn_weights, merge_adapters
from moa_ops.model.storage import scaled_data
from moa_ops.reference import accumulation_dtype
from moa_ops.routing import Routing

if TYPE_CHECKING:
    from moa_ops.model.model import MoAModel


@dataclass
class Merged:
    """What was merged into the base: its update, and those of the base's own weights that were kept."""

    adapter: LoraAdapter
    originals: dict[str, nn.Parameter]


class Combining:
    """The methods of ``MoAModel`` that combine adapters.

    ``merged``: what :meth:`merge_adapter` put into the base, or ``None``. While it is there, the model is its
    (changed) base: no adapter acts.
    """

    merged: Merged | None = None

    def add_weighted_adapter(
        self: MoAModel,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """A new adapter, the last expert, from others with these weights; see :mod:`moa_ops.model.merging`.

        options: svd_rank, density, majority_sign_method, seed. Scales of the adapters count.
        Raises ``ValueError`` for unknown names, a name that is taken, and options out of range.
        """
        self.insert_adapter(self._combined(adapters, weights, combination_type, options), adapter_name)

    def learn_adapter_weights(
        self: MoAModel,
        adapters: Sequence[str],
        batches: Iterable[Mapping[str, Any]],
        *,
        initial: Sequence[float] | None = None,
        steps: int = 50,
        lr: float = 0.05,
        l1: float = 0.0,
    ) -> list[float]:
        """Weights for :meth:`add_weighted_adapter`, one per adapter, that make the model's loss small.

        batches: arguments of the model, with labels; used in turn, from the start again after the last.
        initial: 1/N each by default. steps, lr, l1: see :func:`moa_ops.model.merging.learn_weights`.
        Nothing of the model changes; only the weights are trained.
        """
        ids = [self.expert_id(name) for name in adapters]
        start = torch.full((len(ids),), 1 / len(ids)) if initial is None else torch.as_tensor(initial).float()
        if start.shape != (len(ids),):
            raise ValueError(f"initial must have one weight per adapter, {len(ids)}, got {list(start.shape)}")
        turn = cycle(batches)

        def loss(weights: Tensor) -> Tensor:
            batch = next(turn, None)
            if batch is None:
                raise ValueError("batches is empty")
            call = MixedCall(len(self.adapters), experts=ids, weights=weights)
            with context.use(call):
                return self.base_model(**batch).loss.float()

        training = self.training
        self.eval()
        try:
            with torch.enable_grad():
                return learn_weights(loss, start, steps=steps, lr=lr, l1=l1).tolist()
        finally:
            self.train(training)

    def merge_adapter(
        self: MoAModel,
        adapter_names: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        keep_original: bool = False,
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """Adds W + Σ w_i ΔW_i into the base; from then on, no adapter acts, until :meth:`unmerge_adapter`.

        weights: 1 each by default. keep_original: keeps the base's own weights beside, so that unmerging is
        exact to the bit; otherwise the update is subtracted again, which rounds. combination_type, options:
        as of :meth:`add_weighted_adapter`.

        Raises ``ValueError``, and changes nothing, where the base is quantised, where something is merged
        already, and where a weight would not be finite.
        """
        if self.merged is not None:
            raise ValueError("adapters are merged into the base already; call unmerge_adapter() first")
        weights = [1.0] * len(adapter_names) if weights is None else weights
        adapter = self._combined(adapter_names, weights, combination_type, options)
        for path, factors in adapter.modules.items():
            if not _sum(path, self.layers[path], factors).isfinite().all():
                raise ValueError(f"merging makes weights of {path} that are not finite in their dtype")
        uses = Counter(id(p) for _, p in self.base_model.named_parameters(remove_duplicate=False))
        weights_there = {path: _weight(path, self.layers[path]) for path in adapter.modules}
        # One that is tied to another module's stays in memory anyway, and unmerging ties it again.
        originals = {path: w for path, w in weights_there.items() if keep_original or uses[id(w)] > 1}
        for path, factors in adapter.modules.items():
            self._put_weight(path, _sum(path, self.layers[path], factors))
        self.merged = Merged(adapter, originals)

    def unmerge_adapter(self: MoAModel) -> None:
        """Takes out of the base what :meth:`merge_adapter` put there; adapters act again."""
        if self.merged is None:
            raise ValueError("nothing is merged into the base")
        for path, factors in self.merged.adapter.modules.items():
            if path in self.merged.originals:
                self._put_weight(path, self.merged.originals[path])
            else:
                self._put_weight(path, _sum(path, self.layers[path], factors, sign=-1.0))
        self.merged = None

    def merge_and_unload(
        self: MoAModel,
        adapter_names: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The base model with these adapters merged into it, and nothing of the mixture left.

        adapter_names: by default what is merged already, else the adapter that is set, else the only one.
        The other arguments are those of :meth:`merge_adapter`.
        """
        if self.merged is None:
            if adapter_names is None:
                adapter_names = self.adapters if self.active_adapter is None else [self.active_adapter]
                if len(adapter_names) != 1:
                    raise ValueError(
                        f"say which of the adapters {self.adapters} to merge: adapter_names=[...]"
                    )
            self.merge_adapter(adapter_names, weights, **options)
        elif adapter_names is not None:
            raise ValueError("adapters are merged already; call unmerge_adapter() first, or give no names")
        self.merged = None
        return self.unload()

    def _combined(
        self: MoAModel, names: Sequence[str], weights: Sequence[float], kind: str, options: Mapping[str, Any]
    ) -> LoraAdapter:
        if isinstance(names, str):
            raise TypeError("give a list of adapter names, not one string")
        return merge_adapters([scaled_data(self, name) for name in names], weights, kind, **options)

    def _put_weight(self: MoAModel, path: str, weight: Tensor) -> None:
        """Makes ``weight`` the base weight of a linear. The tensor that was there stays as it is: it may be
        another module's too.
        """
        layer = self.layers[path]
        owner = layer if layer.base_layer is None else layer.base_layer
        old = owner.weight
        owner.weight = (
            weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        )
        self._frozen = [owner.weight if p is old else p for p in self._frozen]


@dataclass(eq=False)
class MixedCall(Call):
    """A pass in which every token has the same mixture: ``experts`` with ``weights`` ``[N]``."""

    experts: list[int] = field(default_factory=list)
    weights: Tensor | None = None

    def routing(self, layer: AdaptedLinear, x: Tensor) -> Routing:
        """The one mixture, for the tokens of x."""
        tokens = x.shape[:-1].numel()
        if tokens not in self.by_tokens:
            indices = torch.tensor(self.experts, device=x.device).expand(tokens, -1)
            weights = self.weights.to(x.device).expand(tokens, -1)
            self.by_tokens[tokens] = Routing.from_indices(indices, weights, num_experts=self.num_experts)
        return self.by_tokens[tokens]


def _weight(path: str, layer: AdaptedLinear) -> nn.Parameter:
    owner = layer if layer.base_layer is None else layer.base_layer
    weight = getattr(owner, "weight", None)
    shape = (layer.out_features, layer.in_features)
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.dtype.is_floating_point
    if not plain or weight.shape not in (shape, shape[::-1]):
        raise ValueError(
            f"{path} is a {type(owner).__name__}, into whose weight nothing can be merged exactly"
        )
    return weight


def _sum(path: str, layer: AdaptedLinear, factors: LoraFactors, sign: float = 1.0) -> Tensor:
    """W ± ΔW, added in float32 at least and rounded once."""
    weight = _weight(path, layer).data
    dtype = accumulation_dtype(weight.dtype)
    delta = factors.delta(dtype).to(weight.device)
    if type(layer.base_layer).__name__ == "Conv1D":
        delta = delta.T
    return (weight.to(dtype) + sign * delta).to(weight.dtype)
