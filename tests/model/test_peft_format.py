"""PEFT's folders: equal outputs both ways, what is refused, damaged and hostile files."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import error
from moa_ops.model.adapter import LoraAdapter, LoraFactors, check_adapter_name
from moa_ops.model.peft_format import (
    _UNSUPPORTED,
    _WITHOUT_EFFECT,
    read_peft_adapter,
    write_peft_adapter,
)

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, 8)
        self.k_proj = nn.Linear(width, 10, bias=False)
        self.out = nn.Linear(18, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.cat([self.q_proj(x), self.k_proj(x)], -1)).tanh()


class Net(nn.Module):
    """Layers whose names are ends of each other, as real models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def save_with_peft(folder: Path, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A PEFT model with adapters that do something, saved to the folder."""
    options.setdefault("target_modules", ["q_proj", "k_proj"])
    model = peft.get_peft_model(model or net(), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model


def apply(model: nn.Module, adapter: LoraAdapter) -> nn.Module:
    """Adds ΔW to the base weights: what the adapter means."""
    with torch.no_grad():
        for path, factors in adapter.modules.items():
            model.get_submodule(path).weight += factors.delta()
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors_torch.load_file(path).items()}
    result = change(tensors)
    safetensors_torch.save_file(result if isinstance(result, dict) else tensors, path)


X = torch.linspace(-1, 1, 7 * 12).view(7, 12)
FIRST = "base_model.model.layers.0.q_proj.lora_A.weight"
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


# --------------------------------------------------------------------------------------------------- refusals


def test_every_setting_of_peft_is_decided_on() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= _WITHOUT_EFFECT | _UNSUPPORTED.keys()
    assert not _WITHOUT_EFFECT & _UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported: DoRA"),
        ({"modules_to_save": ["layers.2.out"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias = 'lora_only'.*trained biases"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"init_lora_weights": "pissa"}, "changes the base weights. Convert"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        (
            {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["q_proj", "k_proj"])},
            "use_bdlora",
        ),
        ({"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}, "velora_config"),
    ],
)
def test_what_peft_saves_and_we_do_not_support(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    save_with_peft(tmp_path, **options)
    with pytest.raises(ValueError, match=message) as raised:
        read_peft_adapter(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("name", sorted(_UNSUPPORTED))
def test_unsupported_settings_by_name(tmp_path: Path, name: str) -> None:
    save_with_peft(tmp_path)
    edit_config(tmp_path, **{name: None})
    read_peft_adapter(tmp_path)
    edit_config(tmp_path, **{name: {"some": "value"}})
    with pytest.raises(ValueError, match=f"{name} = .* is not supported"):
        read_peft_adapter(tmp_path)


def test_embeddings_and_convolutions(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 12))
    save_with_peft(tmp_path / "embedding", model, target_modules=["0"])
    with pytest.raises(ValueError, match="LoRA on an embedding"):
        read_peft_adapter(tmp_path / "embedding")
    save_with_peft(tmp_path / "conv", nn.Sequential(nn.Conv2d(3, 4, 3)), target_modules=["0"])
    with pytest.raises(ValueError, match="convolution"):
        read_peft_adapter(tmp_path / "conv")


def test_other_kinds_of_adapters(tmp_path: Path) -> None:
    model = peft.get_peft_model(net(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type is 'IA3'; only LORA"):
        read_peft_adapter(tmp_path)


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    save_with_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    trace = tmp_path / "trace"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (trace.touch, ())

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match="pickle, which can run any code and is never opened"):
        read_peft_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="not a valid safetensors"):
        read_peft_adapter(tmp_path)
    assert not trace.exists()


# ------------------------------------------------------------------------------------------- damaged, hostile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "says rank 4, but lora_A has shape"),
        ({"r": 10**12}, r"r must be a rank, an integer in \[1, "),
        ({"r": 0}, "must be a rank"),
        ({"r": -8}, "must be a rank"),
        ({"r": 8.0}, "must be a rank"),
        ({"r": "8"}, "must be a rank"),
        ({"r": True}, "must be a rank"),
        ({"r": None}, "must be a rank"),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"lora_alpha": [1]}, "lora_alpha must be a finite number"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\)"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"rank_pattern": [8]}, "rank_pattern must map"),
        ({"rank_pattern": {"q_proj": 2**40}}, "must be a rank"),
        ({"rank_pattern": {"q_proj": 4}}, "says rank 4, but"),
        ({"alpha_pattern": {"q_proj": None}}, "finite number"),
        ({"alpha_pattern": {"(": 4}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "too complex"),
        ({"alpha_pattern": {".*.*.*.*.*b": 4}}, "too complex"),
        ({"alpha_pattern": {"x" * 5000: 4}}, "too complex"),
        ({"peft_type": ["LORA"]}, "only LORA"),
        ({"a_new_setting": 3}, "'a_new_setting' = 3 is not known"),
        ({"init_lora_weights": {}}, "init_lora_weights"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_with_peft(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        read_peft_adapter(tmp_path)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"r": NaN}',
        b'{"r": -Infinity}',
        b"[" * 100_000,
        b" " * (5 << 20),
    ],
)
def test_bad_json(tmp_path: Path, text: bytes) -> None:
    save_with_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(ValueError, match="adapter_config.json"):
        read_peft_adapter(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_alpha_not_finite(tmp_path: Path, value: float) -> None:
    save_with_peft(tmp_path)
    edit_config(tmp_path, lora_alpha=value)
    with pytest.raises(ValueError, match="is not a number"):
        read_peft_adapter(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace(json.dumps(value), "1e999"))
    with pytest.raises(ValueError, match="lora_alpha must be a finite number"):
        read_peft_adapter(tmp_path)


def _spoil(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST][3, 4] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), r"'layers.0.q_proj' has no lora_A"),
        (lambda t: t.pop(FIRST.replace("_A", "_B")), "has no lora_B"),
        (lambda t: t.clear(), "holds no tensors"),
        (lambda t: t.update({FIRST: t[FIRST][:4].clone()}), "ranks of lora_A.*differ"),
        (lambda t: t.update({FIRST: t[FIRST][0].clone()}), "must be a matrix"),
        (lambda t: t.update({FIRST: t[FIRST][:, :0].clone()}), "must be a matrix"),
        (lambda t: t.update({FIRST: t[FIRST].to(torch.int8)}), "torch.int8; allowed are"),
        (lambda t: t.update({FIRST: t[FIRST].to(torch.float8_e4m3fn)}), "allowed are"),
        (_spoil(math.nan), "NaN or infinity"),
        (_spoil(-math.inf), "NaN or infinity"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), "not a factor"),
        (lambda t: t.update({FIRST.replace("lora_A", "lora_C"): torch.ones(2, 2)}), "not a factor"),
        (lambda t: t.update({FIRST.replace("weight", "other.weight"): t[FIRST].clone()}), "two tensors are"),
        (
            lambda t: t.update({FIRST.replace("0", "5").replace("weight", "o.weight"): t[FIRST].clone()}),
            "mixes",
        ),
        (lambda t: t.update({"base_model.model..lora_A.weight": t[FIRST].clone()}), "not a factor"),
        (lambda t: t.update({"base_model.model.a..b.lora_A.weight": t[FIRST].clone()}), "does not name"),
        (lambda t: t.update({"base_model.model.q.lora_B.bias": torch.ones(3)}), "trained bias"),
        (
            lambda t: t.update({"base_model.model.layers.0.q_proj.lora_magnitude_vector": torch.ones(3)}),
            "DoRA",
        ),
    ],
)
def test_bad_tensors(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    save_with_peft(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        read_peft_adapter(tmp_path)


def _header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        _header("{}", length=2**63),
        _header("{}", length=2**40),
        _header("not json"),
        _header('{"a": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4]}}', b"\0" * 4),
        _header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000]}}', b"\0" * 4),
        _header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', b"\0" * 4),
        _header('{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4),
        _header(
            '{"a": {"dtype": "F32", "shape": [9223372036854775807, 4], "data_offsets": [0, 4]}}', b"\0" * 4
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes) -> None:
    save_with_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        read_peft_adapter(tmp_path)


def test_truncated_at_any_place(tmp_path: Path) -> None:
    save_with_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            read_peft_adapter(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_peft_adapter(tmp_path / "nothing")
    save_with_peft(tmp_path / "finance")
    with pytest.raises(FileNotFoundError, match=r"it has the adapters \['finance'\]"):
        read_peft_adapter(tmp_path)
    (tmp_path / "finance" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        read_peft_adapter(tmp_path / "finance")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        "a.b",
        "-a",
        "a b",
        "a\0",
        "é",
        "x" * 129,
        "a\n",
        3,
        "__base__",
    ],
)
def test_names_that_no_adapter_may_have(name: str) -> None:
    with pytest.raises(ValueError):
        check_adapter_name(name)


def test_names() -> None:
    for name in ("finance", "law_2", "a-b", "7", "_x", "x" * 128):
        assert check_adapter_name(name) == name


def test_bad_adapters_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layers"):
        write_peft_adapter(tmp_path / "a", LoraAdapter({}))
    bad = LoraFactors(torch.full((2, 3), math.nan), torch.ones(4, 2), 1.0)
    with pytest.raises(ValueError, match="NaN"):
        write_peft_adapter(tmp_path / "a", LoraAdapter({"q": bad}))
    assert not (tmp_path / "a").exists()
