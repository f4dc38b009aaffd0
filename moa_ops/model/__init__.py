"""Mixture-of-LoRAs models: adapters, routers and their life on disk."""

from moa_ops.model.adapter import LoraAdapter, LoraFactors
from moa_ops.model.config import MoAConfig
from moa_ops.model.context import checkpointed
from moa_ops.model.layer import AdaptedLinear
from moa_ops.model.model import MoAModel, get_moa_model

__all__ = [
    "AdaptedLinear",
    "LoraAdapter",
    "LoraFactors",
    "MoAConfig",
    "MoAModel",
    "checkpointed",
    "get_moa_model",
]
