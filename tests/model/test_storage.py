"""Adapters and mixtures on disk: equal to PEFT both ways, and a model that no failed load changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import TARGETS, inputs, peft_folder
from torch import Tensor, nn
from zoo import build

from helpers import error
from moa_ops import MoAConfig, MoAModel, get_moa_model

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

FAMILIES = list(TARGETS)
# Ranks, alphas, scaling rules, patterns and target lists that differ.
OPTIONS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 5},
    "rslora": {"r": 6, "use_rslora": True, "lora_alpha": 3},
    "patterns": {"r": 3, "rank_pattern": {r".*\.1\..*": 7}, "alpha_pattern": {r".*\.0\..*": 9}},
}


@torch.no_grad()
def run(model: nn.Module, family: str, adapter: str | None = None, **options: Any) -> Tensor:
    given = inputs(family)
    if adapter is not None:
        options["adapter_names"] = [adapter] * len(given["input_ids"])
    return model(**given, **options).logits


@pytest.fixture
def folders(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Path]:
    """PEFT folders for Llama, or for the family of the test's parameter."""
    family = getattr(request, "param", "llama")
    for seed, (name, options) in enumerate(OPTIONS.items()):
        if name == "small":  # fewer layers than the others
            options = options | {"target_modules": TARGETS[family][:1]}
        peft_folder(tmp_path / name, family, seed, **options)
    return {name: tmp_path / name for name in OPTIONS}


def mixture(folders: dict[str, Path], family: str = "llama", **options: Any) -> MoAModel:
    torch.manual_seed(5)
    model = get_moa_model(build(family), MoAConfig(target_modules=TARGETS[family][:1], **options))
    for name, folder in folders.items():
        model.load_adapter(folder, name)
    for router in model.routers.values():
        for parameter in router.parameters():
            nn.init.normal_(parameter)
    return model.eval()


def state(model: MoAModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------ beside PEFT


@pytest.mark.parametrize(("folders", "family"), [(f, f) for f in FAMILIES], indirect=["folders"])
def test_by_id_equals_peft(folders: dict[str, Path], family: str) -> None:
    model = mixture(folders, family)
    plain = run(build(family), family)
    for name, folder in folders.items():
        theirs = run(peft.PeftModel.from_pretrained(build(family), folder).eval(), family)
        assert error(run(model, family, name), theirs) < 1e-6
        assert error(plain, theirs) > 1e-4
    assert torch.equal(run(model, family, "__base__"), plain)
    rows = torch.arange(4) % 3
    names = [list(OPTIONS)[i] for i in rows]
    with torch.no_grad():
        mixed = model(**inputs(family), adapter_names=names).logits
    for row, name in enumerate(names):
        assert error(mixed[row], run(model, family, name)[row]) < 1e-6


@pytest.mark.parametrize(("folders", "family"), [(f, f) for f in FAMILIES], indirect=["folders"])
def test_peft_loads_what_is_exported(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    model = mixture(folders, family)
    model.set_adapter_scale("rslora", 0.5)
    model.add_weighted_adapter(["small", "patterns"], [0.7, -1.2], "mix")
    for name in model.adapters:
        model.export_peft_adapter(name, tmp_path / "export" / name)
        theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "export" / name).eval()
        assert error(run(model, family, name), run(theirs, family)) < 1e-6
    again = mixture({name: tmp_path / "export" / name for name in model.adapters}, family)
    for name in model.adapters:
        assert torch.equal(run(again, family, name), run(model, family, name))


def test_peft_loads_the_folders_of_a_saved_mixture(folders: dict[str, Path], tmp_path: Path) -> None:
    model = mixture(folders)
    model.save_pretrained(tmp_path / "out")
    for name in model.adapters:
        theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "out" / name).eval()
        assert error(run(model, "llama", name), run(theirs, "llama")) < 1e-6


# --------------------------------------------------------------------------------------------- saved mixtures


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router_granularity": "module", "top_k": 2, "routing_level": "token", "norm_topk_prob": True},
        {"router_granularity": "model", "router_type": "mlp", "score_func": "sigmoid"},
        {"router_granularity": "module", "router_type": "prototype"},
        {"router_type": "static", "top_k": None},
    ],
)
def test_saved_and_loaded(folders: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    model = mixture(folders, **options)
    model.set_adapter_scale("rslora", 0.25)
    model.delete_adapter("small")
    model.add_adapter("fresh", r=5)
    model.rename_adapter("patterns", "renamed")
    model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fresh", "moa_config.json", "renamed", "router.safetensors", "rslora",
    ]  # fmt: skip
    again = MoAModel.from_pretrained(build("llama"), tmp_path / "out").eval()
    assert again.adapters == ["rslora", "renamed", "fresh"]
    assert again.moa_config == model.moa_config
    assert same(state(again), state(model))
    assert torch.equal(run(again, "llama"), run(model, "llama"))
    for name in model.adapters:
        assert torch.equal(run(again, "llama", name), run(model, "llama", name))
    assert not again.trainable_parameters()
    again.save_pretrained(tmp_path / "again")
    for file in ("moa_config.json", "router.safetensors", "fresh/adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_trainable_after_loading(folders: dict[str, Path], tmp_path: Path) -> None:
    mixture(folders).save_pretrained(tmp_path / "out")
    model = MoAModel.from_pretrained(build("llama"), tmp_path / "out", is_trainable=True)
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "weight"}
    assert not any(p.requires_grad for name, p in model.base_model.named_parameters() if "lora_" not in name)


def test_saving_again_drops_deleted_adapters_and_keeps_other_files(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = mixture(folders)
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "out" / "rslora" / "notes").write_text("mine")
    (tmp_path / "out" / "other").mkdir()
    (tmp_path / "out" / "other" / "file").write_text("mine")
    model.delete_adapter("small")
    model.save_pretrained(tmp_path / "out")
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"README.md", "rslora/notes", "other/file"} <= files
    assert not any(file.startswith("small") for file in files)
    assert MoAModel.from_pretrained(build("llama"), tmp_path / "out").adapters == ["rslora", "patterns"]


def test_an_empty_mixture(tmp_path: Path) -> None:
    get_moa_model(build("llama"), MoAConfig()).save_pretrained(tmp_path)
    assert MoAModel.from_pretrained(build("llama"), tmp_path).adapters == []


# A process whose save is killed in the middle of writing the second adapter.
KILLED = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from zoo import build
from moa_ops import MoAModel
from moa_ops.model import storage

model = MoAModel.from_pretrained(build("llama"), sys.argv[3])
for router in model.routers.values():
    router.weight.data.zero_()
write, calls = storage.write_tensors, []
def deadly(path, tensors):
    calls.append(path)
    if len(calls) == 2:
        path.write_bytes(b"half of a file")
        os._exit(9)
    write(path, tensors)
storage.write_tensors = deadly
model.save_pretrained(sys.argv[3])
"""


def test_a_killed_save_leaves_the_old_mixture(folders: dict[str, Path], tmp_path: Path) -> None:
    model = mixture(folders)
    model.save_pretrained(tmp_path / "out")
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here), str(here.parents[1]), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    again = MoAModel.from_pretrained(build("llama"), tmp_path / "out")
    assert same(state(again), state(model))


# ------------------------------------------------------------------------------------------- swaps and scales


@pytest.mark.parametrize("new", ["small", "patterns", "large"])
@pytest.mark.parametrize("old", ["small", "rslora"])
def test_hotswap(folders: dict[str, Path], tmp_path: Path, old: str, new: str) -> None:
    """Other ranks and layers; all others by id stay the same to the bit."""
    peft_folder(tmp_path / "large", "llama", 9, r=24, target_modules="all-linear")
    source = {**folders, "large": tmp_path / "large"}[new]
    model = mixture(folders)
    model.set_adapter_scale(old, 0.5)
    others = [name for name in (*model.adapters, "__base__") if name != old]
    before = {name: run(model, "llama", name) for name in others}
    routers = {name: p.clone() for name, p in model.routers.named_parameters()}
    model.hotswap_adapter(source, old)
    for name in others:
        assert torch.equal(run(model, "llama", name), before[name])
    assert all(
        torch.equal(p, routers[name]) for name, p in model.routers.named_parameters() if name in routers
    )
    theirs = peft.PeftModel.from_pretrained(build("llama"), source).eval()
    for module in theirs.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    assert error(run(model, "llama", old), run(theirs, "llama")) < 1e-6


def test_scale(folders: dict[str, Path]) -> None:
    model = mixture(folders)
    before = {name: run(model, "llama", name) for name in model.adapters}
    model.set_adapter_scale("small", 0.0)
    assert error(run(model, "llama", "small"), run(model, "llama", "__base__")) < 1e-6
    model.set_adapter_scale("small", 1.0)
    assert all(torch.equal(run(model, "llama", name), before[name]) for name in model.adapters)
    with pytest.raises(ValueError, match="finite"):
        model.set_adapter_scale("small", float("nan"))


# ----------------------------------------------------------------------------------------------- failed loads


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in safetensors_torch.load_file(path).items()}
    change(tensors)
    safetensors_torch.save_file(tensors, path)


def unchanged(model: MoAModel, act: Callable[[], Any], message: str) -> None:
    before, layers, out = state(model), list(model.layers), run(model, "llama")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        act()
    assert same(state(model), before)
    assert list(model.layers) == layers
    assert torch.equal(run(model, "llama"), out)


def test_a_failed_load_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    model = mixture(folders)
    folder = tmp_path / "bad"
    peft_folder(folder, "llama", 4, target_modules="all-linear")

    def load() -> None:
        model.load_adapter(folder, "bad")

    def swap() -> None:
        model.hotswap_adapter(folder, "small")

    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    for change, message in [
        (lambda t: t.update({key: torch.randn(8, 31)}), r"that linear takes \[8, 32\]"),
        (lambda t: t.update({key: torch.full((8, 32), float("nan"))}), "NaN"),
        (
            lambda t: [t.update({k.replace("layers.1", "layers.7"): t.pop(k)}) for k in list(t)],
            "no linears of this",
        ),
        (
            lambda t: [t.update({k.replace("mlp.up_proj", "mlp"): t.pop(k)}) for k in list(t)],
            "no linears of this",
        ),
    ]:
        edit_tensors(weights, change)
        unchanged(model, load, message)
        unchanged(model, swap, message)
        weights.write_bytes(whole)
    weights.write_bytes(whole[:-3])
    unchanged(model, load, "not a valid safetensors file")
    unchanged(model, swap, "not a valid safetensors file")
    weights.write_bytes(whole)
    unchanged(model, lambda: model.load_adapter(folder, "small"), "already there")
    unchanged(model, lambda: model.load_adapter(folder, "../x"), "cannot name an adapter")
    unchanged(model, lambda: model.hotswap_adapter(folder, "nobody"), "no adapter is called 'nobody'")
    unchanged(model, lambda: model.load_adapter(tmp_path / "nothing", "x"), "no folder")
    load()
    assert model.adapters[-1] == "bad"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("moa_config.json", lambda v: v.update(format=7), "reads format 1"),
        ("moa_config.json", lambda v: v.update(config=3), "config must be an object"),
        ("moa_config.json", lambda v: v["config"].update(new=3), r"unknown settings \['new'\]"),
        ("moa_config.json", lambda v: v["config"].update(r="x"), "r must be a whole number"),
        ("moa_config.json", lambda v: v["config"].update(target_modules=3), "moa_config.json"),
        ("moa_config.json", lambda v: v["config"].update(router_temperature="x"), "moa_config.json"),
        ("moa_config.json", lambda v: v["config"].update(target_modules=["nobody"]), "nobody"),
        ("moa_config.json", lambda v: v.update(modules=["model.layers.9.q"]), "no linear of this"),
        ("moa_config.json", lambda v: v.update(modules=[[]]), "list of names"),
        ("moa_config.json", lambda v: v["adapters"][0].update(name="../small"), "cannot name an adapter"),
        ("moa_config.json", lambda v: v["adapters"][0].update(name="/etc"), "cannot name an adapter"),
        ("moa_config.json", lambda v: v["adapters"][0].update(name=None), "cannot name an adapter"),
        ("moa_config.json", lambda v: v["adapters"][0].update(name="rslora"), "two adapters are called"),
        ("moa_config.json", lambda v: v["adapters"][0].update(name="gone"), "no folder"),
        (
            "moa_config.json",
            lambda v: v["adapters"][0].update(scale="1"),
            "scale of small must be a finite number",
        ),
        ("moa_config.json", lambda v: v["adapters"][0].update(scale=10**400), "finite number"),
        ("moa_config.json", lambda v: v["adapters"].append(3), "an adapter must be an object"),
        ("router.safetensors", lambda t: t.pop("model/layers/0.weight"), "saved routers are other ones"),
        ("router.safetensors", lambda t: t.update({"x": torch.ones(2)}), "saved routers are other ones"),
        ("router.safetensors", lambda t: t["model/layers/0.weight"].fill_(float("inf")), "NaN or infinity"),
        (
            "router.safetensors",
            lambda t: t.update({"model/layers/0.weight": torch.ones(4, 32)}),
            "this model has",
        ),
        (
            "router.safetensors",
            lambda t: t.update({"model/layers/0.weight": torch.ones(3, 32).int()}),
            "int32",
        ),
        ("small/adapter_model.safetensors", lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_a_failed_from_pretrained_leaves_the_base(
    folders: dict[str, Path], tmp_path: Path, file: str, change: Callable[[Any], Any], message: str
) -> None:
    mixture(folders).save_pretrained(tmp_path / "out")
    edit = edit_json if file.endswith("json") else edit_tensors
    edit(tmp_path / "out" / file, change)
    base = build("llama")
    modules, out = dict(base.named_modules()), run(base, "llama")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MoAModel.from_pretrained(base, tmp_path / "out")
    assert dict(base.named_modules()) == modules
    assert all(p.requires_grad for p in base.parameters())
    assert torch.equal(run(base, "llama"), out)


@pytest.mark.parametrize("file", ["moa_config.json", "router.safetensors"])
def test_a_truncated_mixture(folders: dict[str, Path], tmp_path: Path, file: str) -> None:
    mixture(folders).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / file
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=file):
            MoAModel.from_pretrained(build("llama"), tmp_path / "out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file}"):
        MoAModel.from_pretrained(build("llama"), tmp_path / "out")


def test_another_model(folders: dict[str, Path], tmp_path: Path) -> None:
    mixture(folders).save_pretrained(tmp_path / "out")
    base = build("gpt2")
    with pytest.raises(ValueError, match="q_proj"):
        MoAModel.from_pretrained(base, tmp_path / "out")
    with pytest.raises(ValueError, match="no linears of this GPT2LMHeadModel"):
        get_moa_model(base, MoAConfig(target_modules=["c_attn"])).load_adapter(folders["small"], "x")
