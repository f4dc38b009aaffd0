"""Small models of real transformers classes, with a batch for each, and adapters that do something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moa_ops import MoAConfig, MoAModel, get_moa_model
from moa_ops.model import LoraAdapter, LoraFactors

transformers = pytest.importorskip("transformers", reason="models are built from transformers' classes")

VOCAB = 64
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_GROUPED, **changes}))


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens, **dropout))


def _bert() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**{**_TEXT, **dropout}, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def _t5() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, **tokens, num_decoder_layers=2, dropout_rate=0.0)
    )


def _vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    )


def _albert() -> nn.Module:
    """Its layers share one set of weights."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.AlbertConfig(**{**_TEXT, **dropout}, embedding_size=16, num_labels=3)
    return transformers.AlbertForSequenceClassification(config)


def _moe(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**_GROUPED, **sizes)
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return make


def _causal(kind: str) -> Callable[[], nn.Module]:
    return _moe(kind)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen3": _causal("Qwen3"),
    "gemma": _causal("Gemma"),
    "mistral": _causal("Mistral"),
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "vit": _vit,
    "albert": _albert,
    "mixtral": _moe("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _moe("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model with weights large enough that its layers matter, in eval mode."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
    return model


def batch_of(name: str, rows: int = 3, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Arguments for ``forward``, with labels; the second row of text is shorter, padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def text(size: int) -> Tensor:
        return torch.randint(2, VOCAB, (rows, size), generator=generator)

    if name == "vit":
        labels = torch.randint(0, 3, (rows,), generator=generator)
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator), "labels": labels}
    ids, mask = text(length), torch.ones(rows, length, dtype=torch.long)
    if rows > 1:
        mask[1, length - 2 :] = 0
        ids[1, length - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name in ("bert", "albert"):
        return {**batch, "labels": torch.randint(0, 3, (rows,), generator=generator)}
    if name == "t5":
        return {**batch, "labels": text(length - 2)}
    return {**batch, "labels": ids.masked_fill(mask == 0, -100)}


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a decoder needs in their place is made from them."""
    rest = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    if labels.dim() == 2 and labels.shape != batch["input_ids"].shape:
        rest["decoder_input_ids"] = labels
    return rest


def fill(model: MoAModel, size: float = 0.3, seed: int = 2) -> MoAModel:
    """Gives every adapter a random B, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name in model.adapters:
        adapter = model.adapter_data(name)
        modules = {
            path: LoraFactors(
                f.A, torch.randn(f.B.shape, generator=generator) * size, f.lora_alpha, f.use_rslora
            )
            for path, f in adapter.modules.items()
        }
        model.replace_adapter(LoraAdapter(modules, adapter.lora_dropout, adapter.fan_in_fan_out), name)
    return model


def mixture(
    name: str = "llama", adapters: tuple[str, ...] = ("a", "b", "c"), seed: int = 0, **config: Any
) -> MoAModel:
    """A model with filled adapters of different ranks and alphas, over all linears unless said otherwise."""
    model = get_moa_model(build(name, seed), MoAConfig(**{"r": 4, "target_modules": "all-linear", **config}))
    for number, adapter in enumerate(adapters):
        model.add_adapter(adapter, r=4 - number % 3, lora_alpha=4 + number)
    fill(model)
    with torch.no_grad():
        for parameter in model.routers.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.normal_(std=0.5)
    return model.eval()
