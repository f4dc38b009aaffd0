"""Mixture-of-LoRAs models: adapters, routers and their life on disk."""

from moa_ops.model.adapter import LoraAdapter, LoraFactors
from moa_ops.model.config import MoAConfig
from moa_ops.model.context import checkpointed
from moa_ops.model.layer import AdaptedLinear
from moa_ops.model.merging import COMBINATION_TYPES, learn_weights, merge_adapters
from moa_ops.model.model import MoAModel, get_moa_model
from moa_ops.model.peft_format import read_peft_adapter, write_peft_adapter

__all__ = [
    "COMBINATION_TYPES",
    "AdaptedLinear",
    "LoraAdapter",
    "LoraFactors",
    "MoAConfig",
    "MoAModel",
    "checkpointed",
    "get_moa_model",
    "learn_weights",
    "merge_adapters",
    "read_peft_adapter",
    "write_peft_adapter",
]
