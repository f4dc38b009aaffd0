"""``generate`` of a mixture: decisions taken at the prompt and kept, per row, for all new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_ops.model import context

if TYPE_CHECKING:
    from moa_ops.model.model import MoAModel


@torch.no_grad()
def generate(
    model: MoAModel,
    args: tuple,
    kwargs: dict[str, Any],
    adapter_names: Sequence[str] | None = None,
    adapter_ids: Tensor | None = None,
    routing_mask: Tensor | None = None,
) -> Any:
    """``base_model.generate(*args, **kwargs)`` with adapters.

    At sequence level the routers read the prompt (where ``routing_mask`` allows, by default where
    ``attention_mask`` does) when it is first run; what they decide holds for its row until the end. At token
    level every new token is routed. By id, names or ids are per prompt; beams and several returned sequences
    take over those of theirs.

    A decoder-only model continues after a row's last position, so prompts padded on the right are moved to
    the right edge first; the output then starts with the padding.
    """
    if args and "input_ids" not in kwargs:
        kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
    kwargs, routing_mask = _left_padded(model, kwargs, routing_mask)
    call = model._call(
        kwargs, adapter_names=adapter_names, adapter_ids=adapter_ids, routing_mask=routing_mask
    )
    call.kept = {}
    with context.use(call):
        output = model.base_model.generate(*args, **kwargs)
    call.observe()
    return output


def _left_padded(
    model: MoAModel, kwargs: dict[str, Any], routing_mask: Tensor | None
) -> tuple[dict[str, Any], Tensor | None]:
    """The prompts with every row's padding in front, if the model is a decoder and they are not so yet."""
    mask, input_ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if model._has_encoder() or mask is None or input_ids is None or mask.shape != input_ids.shape:
        return kwargs, routing_mask
    if kwargs.get("past_key_values") is not None or bool(mask[:, -1].all()):
        return kwargs, routing_mask
    order = mask.bool().long().argsort(dim=1, stable=True)  # padding first, everything else in its order
    moved = {"input_ids": input_ids.gather(1, order), "attention_mask": mask.gather(1, order)}
    for name in ("position_ids", "token_type_ids"):
        if kwargs.get(name) is not None:
            moved[name] = kwargs[name].gather(1, order)
    if routing_mask is not None:
        routing_mask = routing_mask.gather(1, order)
    return {**kwargs, **moved}, routing_mask


@torch.no_grad()
def composite_logits(model: MoAModel, adapter_names: Sequence[str], **batch: Any) -> Tensor:
    """Mean of the logits that each of the adapters alone gives (LoRA Composite, arXiv 2402.16843).

    batch: arguments of the base model, without labels; the adapters run one after the other.
    """
    if not adapter_names:
        raise ValueError("a composite needs at least one adapter")
    total = 0
    for name in adapter_names:
        rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        total = total + model(**batch, adapter_names=[name] * rows).logits
    return total / len(adapter_names)


def composite_generate(
    model: MoAModel, input_ids: Tensor, adapter_names: Sequence[str], **kwargs: Any
) -> Tensor:
    """Greedy generation from the mean of the adapters' log-probabilities at every step, with KV cache.

    Every prompt runs once per adapter in one batch, and its copies get the same token. Raises ``ValueError``
    for sampling and beams, which would let the copies part.
    """
    from transformers import LogitsProcessorList

    if kwargs.get("do_sample") or kwargs.get("num_beams", 1) != 1:
        raise ValueError("composite_generate is greedy: leave do_sample and num_beams out")
    count = len(adapter_names)

    def mean(_ids: Tensor, scores: Tensor) -> Tensor:
        together = scores.log_softmax(-1).view(-1, count, scores.shape[-1]).mean(1)
        return together.repeat_interleave(count, 0)

    ids = model.ids_of(adapter_names).to(input_ids.device).repeat(len(input_ids))
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = kwargs["attention_mask"].repeat_interleave(count, 0)
    kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), mean])
    inputs = input_ids.repeat_interleave(count, 0)
    output = model.generate(inputs, adapter_ids=ids, do_sample=False, num_beams=1, **kwargs)
    return output[::count]
