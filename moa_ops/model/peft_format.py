"""PEFT's LoRA folders: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

Reading executes nothing: JSON and safetensors only, never pickle. Everything is checked before anything is
returned, and what the mathematics of :class:`~moa_ops.model.adapter.LoraFactors` does not cover is an error
that names it. Checked against PEFT 0.21: every field of its ``LoraConfig`` is decided on below.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_ops.model.adapter import LoraAdapter, LoraFactors
from moa_ops.model.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from moa_ops.model.targets import by_pattern

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_MAX_RANK = 1 << 20
_PREFIX = "base_model.model."
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Settings that change no output of a trained adapter, or whose effect the tensors show.
# fmt: off
_WITHOUT_EFFECT = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "ensure_weight_tying",
})
# fmt: on
_UNSUPPORTED = {
    "use_dora": "DoRA (a trained magnitude per output)",
    "modules_to_save": "fully trained modules beside the adapter",
    "lora_bias": "a trained bias of lora_B",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters (as of fused experts)",
    "layer_replication": "a base model with repeated layers",
    "alora_invocation_tokens": "activated LoRA (active only after an invocation sequence)",
    "use_qalora": "QA-LoRA (pooled inputs)",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA (a truncated base and a diagonal between the factors)",
    "monteclora_config": "MonteCLoRA (sampled factors)",
    "velora_config": "VeLoRA (compressed activations in training)",
    "arrow_config": "an Arrow router over other adapters",
    "megatron_config": "LoRA on Megatron's parallel layers",
}
# Starts that leave the base as it was; the others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) subtract from it.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_FOREIGN_TENSORS = (
    (r"\.lora_embedding_[AB]\b", "LoRA on an embedding"),
    (r"\.lora_magnitude_vector\b", "DoRA's magnitudes"),
    (r"\.lora_[AB](\.[^.]+)?\.bias$", "a trained bias of the adapter (lora_bias)"),
    (r"\.modules_to_save\.", "a fully trained module (modules_to_save)"),
    (r"\.token_adapter\.|trainable_tokens", "trained token embeddings"),
    (r"\.lora_diag\b", "KaSA's diagonal"),
    (r"\.bias$", "a trained bias"),
)
_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


def read_peft_adapter(folder: str | os.PathLike[str]) -> LoraAdapter:
    """The adapter in a PEFT folder, on the CPU, in the dtypes of its file.

    Raises ``FileNotFoundError`` where a file is missing and ``ValueError`` for anything damaged,
    contradictory or not supported, naming the folder and what is wrong with it.
    """
    folder = Path(folder)
    config = read_json(_existing(folder, CONFIG_NAME))
    try:
        settings = _check_config(config)
        tensors = read_tensors(_existing(folder, WEIGHTS_NAME))
        modules = {path: _factors(path, pair, settings) for path, pair in sorted(_pairs(tensors).items())}
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return LoraAdapter(
        modules,
        lora_dropout=settings["lora_dropout"],
        fan_in_fan_out=settings["fan_in_fan_out"],
        notes={key: config.get(key) for key in ("task_type", "base_model_name_or_path", "revision")},
    )


def write_peft_adapter(
    folder: str | os.PathLike[str], adapter: LoraAdapter, module_names: Iterable[str] = ()
) -> None:
    """Writes the adapter so that PEFT loads it with equal outputs; the folder changes whole or not at all.

    module_names: names of all modules of the base model. With them, layers are listed in ``target_modules``
        by their last names where that selects exactly the adapter's layers; otherwise by full names.

    Raises ``ValueError`` for an adapter without layers or with factors that do not fit each other.
    """
    config, tensors = peft_files(adapter, module_names)
    with atomic_folder(folder) as new:
        write_json(new / CONFIG_NAME, config)
        write_tensors(new / WEIGHTS_NAME, tensors)


def peft_files(
    adapter: LoraAdapter, module_names: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What PEFT's two files hold for this adapter: the configuration and the tensors by their keys."""
    if not adapter.modules:
        raise ValueError("the adapter has no layers; PEFT has no form for an empty adapter")
    for path, factors in adapter.modules.items():
        check_factors(path, factors.A, factors.B)
    rslora = Counter(factors.use_rslora for factors in adapter.modules.values()).most_common(1)[0][0]
    ranks = {path: factors.r for path, factors in adapter.modules.items()}
    # PEFT has one use_rslora for all layers: alpha of the others is expressed in the common rule.
    alphas = {
        path: f.lora_alpha if f.use_rslora == rslora else f.scaling * (math.sqrt(f.r) if rslora else f.r)
        for path, f in adapter.modules.items()
    }
    r, rank_pattern = _common(ranks)
    lora_alpha, alpha_pattern = _common(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "revision": None,
        **adapter.notes,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        "lora_dropout": adapter.lora_dropout,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "target_modules": _target_modules(adapter.modules, set(module_names)),
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    tensors = {}
    for path, factors in adapter.modules.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = factors.A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = factors.B
    return config, tensors


# ------------------------------------------------------------------------------------------ the configuration


def _check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter, checked. Raises ValueError for what is not supported or makes no sense."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise ValueError(f"peft_type is {peft_type!r}; only LORA adapters can be read")
    for name, value in config.items():
        if name in _UNSUPPORTED and _is_set(value):
            raise ValueError(f"{name} = {_short(value)} is not supported: {_UNSUPPORTED[name]}")
        if name not in _UNSUPPORTED and name not in _WITHOUT_EFFECT and _is_set(value):
            raise ValueError(
                f"the setting {_short(name)} = {_short(value)} is not known, so its effect would be lost"
            )
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias = {_short(config['bias'])} is not supported: trained biases of the base")
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
        raise ValueError(
            f"init_lora_weights = {_short(init)} is not supported: it changes the base weights. Convert the "
            "adapter with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return {
        "r": _rank("r", config.get("r", 8)),
        "lora_alpha": finite_number("lora_alpha", config.get("lora_alpha", 8)),
        "use_rslora": _flag("use_rslora", config.get("use_rslora")),
        "fan_in_fan_out": _flag("fan_in_fan_out", config.get("fan_in_fan_out")),
        "lora_dropout": _probability("lora_dropout", config.get("lora_dropout")),
        "rank_pattern": _pattern("rank_pattern", config.get("rank_pattern"), _rank),
        "alpha_pattern": _pattern("alpha_pattern", config.get("alpha_pattern"), finite_number),
    }


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != []  # {} means "with defaults" to PEFT


def finite_number(name: str, value: Any) -> float:
    """``value`` if it is a number that a float can hold, else a ``ValueError`` that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {_short(value)}")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float
        return False


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise ValueError(f"{name} must be a rank, an integer in [1, {_MAX_RANK}], got {_short(value)}")
    return value


def _flag(name: str, value: Any) -> bool:
    if value not in (None, True, False):
        raise ValueError(f"{name} must be true or false, got {_short(value)}")
    return bool(value)


def _probability(name: str, value: Any) -> float:
    value = finite_number(name, 0.0 if value is None else value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {_short(value)}")
    return value


def _pattern(name: str, value: Any, check: Any) -> dict[str, Any]:
    """A map from regular expressions over layer names to ranks or alphas."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must map names to numbers, got {_short(value)}")
    for pattern, number in value.items():
        check(f"{name}[{_short(pattern)}]", number)
        # Backtracking takes exponential time where a repeated group holds a repeat, and n^k for k repeats.
        if len(pattern) > 1024 or re.search(r"\)\s*[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
            raise ValueError(f"{name}: the pattern {_short(pattern)} is too complex to be matched safely")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {_short(pattern)} is no regular expression: {error}") from error
    return value


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches, else the path itself as a name, else the default."""
    return by_pattern(patterns, path, patterns.get(path, default))


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and a pattern for every path with another one."""
    common = Counter(values.values()).most_common(1)[0][0]
    others = {path: value for path, value in values.items() if value != common}
    return common, {"^" + re.escape(path): value for path, value in others.items()}


def _target_modules(paths: Collection[str], module_names: Collection[str]) -> list[str] | str:
    """What makes PEFT select exactly ``paths``: last names, else full names, else a regular expression."""

    def selected(targets: set[str]) -> set[str]:
        ends = tuple(f".{target}" for target in targets)
        return {name for name in module_names if name in targets or name.endswith(ends)}

    last_names = {path.rpartition(".")[2] for path in paths}
    if module_names and selected(last_names) == set(paths):
        return sorted(last_names)
    if selected(set(paths)) <= set(paths):
        return sorted(paths)
    return "|".join(re.escape(path) for path in sorted(paths))


# ------------------------------------------------------------------------------------------------ the tensors


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{path: {"A": tensor, "B": tensor}}. Raises ValueError for keys that are not a LoRA's."""
    if not tensors:
        raise ValueError(f"{WEIGHTS_NAME} holds no tensors")
    pairs: dict[str, dict[str, Tensor]] = {}
    inner_names = set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        foreign = next((what for pattern, what in _FOREIGN_TENSORS if re.search(pattern, key)), None)
        if match is None or foreign:
            what = foreign or "not a factor of a LoRA on a linear layer"
            raise ValueError(f"the tensor {_short(key)} is not supported: {what}")
        path, side = match["path"], match["side"]
        if not all(path.split(".")) or len(path) > 1024:
            raise ValueError(f"the tensor {_short(key)} does not name a module")
        inner_names.add(match["adapter"])
        if side in pairs.setdefault(path, {}):
            raise ValueError(f"two tensors are lora_{side} of {_short(path)}")
        pairs[path][side] = tensor
    if len(inner_names) > 1:
        raise ValueError(f"the file mixes several adapters: {sorted(map(str, inner_names))}")
    return pairs


def _factors(path: str, pair: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LoraFactors:
    for side in "AB":
        if side not in pair:
            raise ValueError(f"{_short(path)} has no lora_{side}")
    A, B = pair["A"], pair["B"]
    check_factors(path, A, B)
    r = _matching(settings["rank_pattern"], path, settings["r"])
    if A.shape[0] != r:
        raise ValueError(
            f"{_short(path)}: {CONFIG_NAME} says rank {r}, but lora_A has shape {list(A.shape)} ([r, in])"
        )
    alpha = _matching(settings["alpha_pattern"], path, settings["lora_alpha"])
    return LoraFactors(A, B, alpha, settings["use_rslora"])


def check_factors(path: str, A: Tensor, B: Tensor) -> None:
    """Raises ``ValueError``, naming ``path``, where A ``[r, in]`` and B ``[out, r]`` are no factors."""
    for side, tensor in (("A", A), ("B", B)):
        name = f"lora_{side} of {_short(path)}"
        if tensor.dim() in (3, 4, 5):
            raise ValueError(f"{name} has shape {list(tensor.shape)}: LoRA on a convolution is not supported")
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(f"{name} must be a matrix, got shape {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; allowed are {[str(dtype) for dtype in _DTYPES]}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    if A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{_short(path)}: the ranks of lora_A {list(A.shape)} ([r, in]) and lora_B {list(B.shape)} "
            "([out, r]) differ"
        )


# -------------------------------------------------------------------------------------------------- the files


def _existing(folder: Path, name: str) -> Path:
    """The file, or an error that says what is there instead."""
    path = folder / name
    if path.is_file():
        return path
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if name == WEIGHTS_NAME and (folder / PICKLE_NAME).exists():
        raise FileNotFoundError(
            f"{folder} holds {PICKLE_NAME}, a pickle, which can run any code and is never opened. Load it "
            "with PEFT where you trust it, and save it again with save_pretrained: that writes safetensors"
        )
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; it has the adapters {inner} in folders of their own: name one" if inner else ""
    raise FileNotFoundError(f"{folder} has no {name}{hint}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
