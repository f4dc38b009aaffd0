"""PEFT's folders: what is refused, damaged and hostile files."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_net import FIRST, edit_config, edit_tensors, net, peft, save_with_peft
from torch import Tensor, nn

from moa_ops.model.adapter import LoraAdapter, LoraFactors, check_adapter_name
from moa_ops.model.peft_format import (
    _UNSUPPORTED,
    _WITHOUT_EFFECT,
    read_peft_adapter,
    write_peft_adapter,
)

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
