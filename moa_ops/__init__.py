"""Mixtures of LoRAs on hand-written kernels: routing, the mixture itself, a layer made of both, and
models of such layers.
"""

from moa_ops.functional import moa_linear, segment_lora, topk_routing
from moa_ops.linear import MoALinear
from moa_ops.model import MoAConfig, MoAModel, get_moa_model
from moa_ops.routing import Routing
from moa_ops.version import __version__

__all__ = [
    "MoAConfig",
    "MoALinear",
    "MoAModel",
    "Routing",
    "__version__",
    "get_moa_model",
    "moa_linear",
    "segment_lora",
    "topk_routing",
]
