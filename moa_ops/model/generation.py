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
        return model.base_model.generate(*args, **kwargs)


def _left_padded(
    model: MoAModel, kwargs: dict[str, Any], routing_mask: Tensor | None
) -> tuple[dict[str, Any], Tensor | None]:
    """The prompts with every row's padding in front, if the model is a decoder and they are not so yet."""
    mask, input_ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    encoder_decoder = getattr(getattr(model.base_model, "config", None), "is_encoder_decoder", False)
    if encoder_decoder or mask is None or input_ids is None or mask.shape != input_ids.shape:
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
