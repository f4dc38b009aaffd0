"""Small models of ``transformers``, built from their configs, with inputs for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wo"],
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model in eval mode; the same weights for the same seed."""
    torch.manual_seed(seed)
    t = transformers
    if name == "llama":
        config = t.LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return t.LlamaForCausalLM(config).eval()
    if name == "gpt2":
        config = t.GPT2Config(
            vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        return t.GPT2LMHeadModel(config).eval()
    if name == "bert":
        config = t.BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=64,
        )  # fmt: skip
        return t.BertForMaskedLM(config).eval()
    config = t.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return t.T5ForConditionalGeneration(config).eval()


def batch(name: str, rows: int = 4, length: int = 9, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 60, (rows, 5), generator=generator)
    return inputs


def peft_folder(folder: Any, name: str, seed: int, **options: Any) -> None:
    """An adapter trained by nobody, but whose B is not zero, saved by PEFT."""
    peft = pytest.importorskip("peft")
    options.setdefault("target_modules", TARGETS[name])
    options.setdefault("fan_in_fan_out", name == "gpt2")
    torch.manual_seed(seed)
    model = peft.get_peft_model(build(name), peft.LoraConfig(**options))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
