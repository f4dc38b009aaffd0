"""PEFT's folders: equal outputs both ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft_net import FIRST, X, edit_tensors, net, peft, safetensors_torch, save_with_peft
from torch import Tensor, nn

from helpers import error
from moa_ops.model.adapter import LoraAdapter, LoraFactors
from moa_ops.model.peft_format import read_peft_adapter, write_peft_adapter


def apply(model: nn.Module, adapter: LoraAdapter) -> nn.Module:
    """Adds ΔW to the base weights: what the adapter means."""
    with torch.no_grad():
        for path, factors in adapter.modules.items():
            model.get_submodule(path).weight += factors.delta()
    return model


PATTERNS = {"rank_pattern": {"layers.1.q_proj": 5, "k_proj": 3}, "alpha_pattern": {r"^layers\.[02]\..*": 7}}
VARIANTS = {
    "plain": {},
    "alpha": {"r": 3, "lora_alpha": 11},
    "rslora": {"r": 5, "use_rslora": True},
    "patterns": PATTERNS,
    "patterns, rslora": {**PATTERNS, "use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "layers.1.out"], "layers_to_transform": None},
    "by number": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "regular expression": {"target_modules": r"layers\.\d\.(q_proj|out)|out"},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "other start": {"init_lora_weights": "gaussian", "lora_dropout": 0.25},
}


# ---------------------------------------------------------------------------------------------- equal outputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_peft_means(tmp_path: Path, variant: str) -> None:
    theirs = save_with_peft(tmp_path, **VARIANTS[variant]).eval()
    adapter = read_peft_adapter(tmp_path)
    assert error(apply(net(), adapter)(X), theirs(X)) < 1e-6
    assert error(net()(X), theirs(X)) > 1e-2
    layers = dict(theirs.base_model.model.named_modules())
    for path, factors in adapter.modules.items():
        assert factors.r == layers[path].r["default"]
        assert factors.scaling == pytest.approx(layers[path].scaling["default"], rel=1e-15)
    assert adapter.lora_dropout == VARIANTS[variant].get("lora_dropout", 0.0)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_reads_what_is_written(tmp_path: Path, variant: str, named: bool) -> None:
    theirs = save_with_peft(tmp_path / "a", **VARIANTS[variant]).eval()
    names = [name for name, _ in net().named_modules()] if named else []
    write_peft_adapter(tmp_path / "b", read_peft_adapter(tmp_path / "a"), names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys
        again = peft.PeftModel.from_pretrained(net(), tmp_path / "b").eval()
    assert torch.equal(again(X), theirs(X))
    adapted = {name for name, module in again.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}


def test_mixed_scaling_rules_become_one(tmp_path: Path) -> None:
    """PEFT has one use_rslora for all layers of an adapter; merged ones may have both."""
    modules = {
        f"layers.{i}.q_proj": LoraFactors(torch.randn(r, 12), torch.randn(8, r), alpha, rslora)
        for i, (r, alpha, rslora) in enumerate([(4, 3, True), (2, 5.5, False), (9, -1, True)])
    }
    adapter = LoraAdapter(modules)
    write_peft_adapter(tmp_path, adapter)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    assert error(theirs(X), apply(net(), adapter)(X)) < 1e-6
    assert read_peft_adapter(tmp_path).max_rank == 9


def test_names_that_end_each_other(tmp_path: Path) -> None:
    """The name "out" ends "layers.0.out" too: then only a regular expression selects it alone."""
    adapter = LoraAdapter({"out": LoraFactors(torch.randn(2, 12), torch.randn(5, 2), 2.0)})
    write_peft_adapter(tmp_path, adapter, [name for name, _ in net().named_modules()])
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert [name for name, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")] == ["out"]
    assert error(theirs(X), apply(net(), adapter)(X)) < 1e-6


def test_last_names_where_they_select_the_same(tmp_path: Path) -> None:
    save_with_peft(tmp_path)
    adapter = read_peft_adapter(tmp_path)
    write_peft_adapter(tmp_path, adapter, [name for name, _ in net().named_modules()])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2 keeps weights as [in, out]; A and B lie as always."""
    from transformers.pytorch_utils import Conv1D

    def model() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(Conv1D(6, 12), nn.Tanh(), Conv1D(5, 6))

    theirs = save_with_peft(tmp_path, model(), target_modules=["0", "2"], fan_in_fan_out=True).eval()
    adapter = read_peft_adapter(tmp_path)
    assert adapter.fan_in_fan_out
    ours = model()
    with torch.no_grad():
        for path, factors in adapter.modules.items():
            ours.get_submodule(path).weight += factors.delta().T
    assert error(ours(X), theirs(X)) < 1e-6
    write_peft_adapter(tmp_path / "b", adapter)
    assert torch.equal(peft.PeftModel.from_pretrained(model(), tmp_path / "b").eval()(X), theirs(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    save_with_peft(tmp_path)
    edit_tensors(tmp_path, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    adapter = read_peft_adapter(tmp_path)
    assert {f.A.dtype for f in adapter.modules.values()} == {dtype}
    write_peft_adapter(tmp_path / "b", adapter)
    again = read_peft_adapter(tmp_path / "b")
    assert all(torch.equal(again.modules[path].A, f.A) for path, f in adapter.modules.items())


def test_keys_with_an_adapter_name_and_without_the_prefix(tmp_path: Path) -> None:
    save_with_peft(tmp_path)
    plain = read_peft_adapter(tmp_path)

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            key.removeprefix("base_model.model.").replace(".weight", ".my-adapter.weight"): tensor
            for key, tensor in tensors.items()
        }

    edit_tensors(tmp_path, rename)
    assert FIRST not in safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    named = read_peft_adapter(tmp_path)
    assert named.modules.keys() == plain.modules.keys()
    assert all(torch.equal(named.modules[path].B, f.B) for path, f in plain.modules.items())
