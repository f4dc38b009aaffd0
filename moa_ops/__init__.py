"""Mixtures of LoRAs on hand-written kernels: routing, the mixture itself, and a layer made of both."""

from moa_ops.functional import moa_linear, segment_lora, topk_routing
from moa_ops.linear import MoALinear
from moa_ops.routing import Routing
from moa_ops.version import __version__

__all__ = ["MoALinear", "Routing", "__version__", "moa_linear", "segment_lora", "topk_routing"]
