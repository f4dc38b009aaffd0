"""``transformers.Trainer`` and ``accelerate`` as they are: what they save, and that resuming is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import VOCAB, build, mixture

from moa_ops import MoAConfig, MoAModel

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
safetensors_torch = pytest.importorskip("safetensors.torch")

STEPS = 4
C_ATTN = "base_model.transformer.h.0.attn.c_attn."


def data(domains: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(32):
        ids = torch.randint(2, VOCAB, (8,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids} | ({"domain_ids": number % 3} if domains else {}))
    return rows


def model_in(stage: str, family: str = "gpt2", **config: Any) -> MoAModel:
    """Ready for one adapter alone, the routers with domain labels, or everything."""
    model = mixture(family, lora_dropout=0.1, **config)
    model.train()
    if stage == "adapter":
        model.set_adapter("b")
    model.set_trainable(experts=stage != "routers", router=stage != "adapter")
    return model


def trainer(model: MoAModel, folder: Path, domains: bool = True, **arguments: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 4, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    options = transformers.TrainingArguments(str(folder), **settings | arguments)
    rows = data(domains)
    return transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows[:8])


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def state(model: MoAModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("stage", ["adapter", "routers", "all"])
def test_resume_is_exact(tmp_path: Path, stage: str) -> None:
    """The losses after a resume are those of the run that went on, to the bit; so is the model."""
    model = model_in(stage)
    start = state(model)
    whole = trainer(model, tmp_path, domains=stage != "adapter")
    whole.train()
    trained = state(model)
    resumed_model = model_in(stage)
    resumed = trainer(resumed_model, tmp_path, domains=stage != "adapter")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(whole)) == STEPS
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in state(resumed_model).items())
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert {"router" in name for name in changed} == {"adapter": {False}, "routers": {True}}.get(
        stage, {False, True}
    )


def test_a_checkpoint_holds_adapters_and_routers_alone(tmp_path: Path) -> None:
    model = model_in("all")
    trainer(model, tmp_path).train()
    tensors = safetensors_torch.load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B", "weight", "_extra_state"}
    assert sum("routers." in name for name in tensors) == len(model.routers)
    assert sum(name.endswith("lora_A") for name in tensors) == len(model.layers)


def test_from_pretrained_reads_a_checkpoint(tmp_path: Path) -> None:
    model = model_in("all")
    model.set_adapter_scale("a", 0.5)
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "final"))
    again = MoAModel.from_pretrained(build("gpt2"), tmp_path / "final")
    assert again.adapters == model.adapters
    assert again.moa_config == model.moa_config
    assert again.adapter_scale("a") == 0.5
    ours, theirs = state(again), state(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    path = tmp_path / "final" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a valid safetensors"):
        MoAModel.from_pretrained(build("gpt2"), tmp_path / "final")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("_extra_state"), "not the state of a mixture"),
        (lambda t: t.update(_extra_state=torch.tensor([1, 2], dtype=torch.uint8)), "not valid JSON"),
        (lambda t: t.update(_extra_state=torch.ones(2)), "not the description"),
        (lambda t: t.pop(C_ATTN + "lora_A"), "missing or not described"),
        (lambda t: t.update({C_ATTN + "lora_B": torch.ones(3, 96, 2)}), "does not fit"),
        (lambda t: t[C_ATTN + "lora_B"].fill_(float("nan")), "NaN"),
        (lambda t: t.pop("routers.transformer/h/0.weight"), "saved routers are other ones"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint(tmp_path: Path, edit: Any, message: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in mixture("gpt2").state_dict().items()}
    edit(tensors)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    base = build("gpt2")
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match=message):
        MoAModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == modules


def test_best_model_and_evaluation(tmp_path: Path) -> None:
    model = model_in("all")
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, **options)
    run.train()
    best = safetensors_torch.load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in state(model).items())
    assert len([entry for entry in run.state.log_history if "eval_loss" in entry]) == 2


def test_gradient_accumulation_and_checkpointing(tmp_path: Path) -> None:
    """Two half batches and recomputed activations give the parameters of one whole batch."""
    results = []
    for number, options in enumerate(
        [
            {"per_device_train_batch_size": 4},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
        ]
    ):
        model = mixture("llama").train()
        model.set_trainable(experts=True, router=True)
        run = trainer(model, tmp_path / str(number), max_steps=2, optim="sgd", **options)
        run.train()
        results.append(state(model))
    for other in results[1:]:
        for name, tensor in other.items():
            assert torch.allclose(tensor.float(), results[0][name].float(), atol=2e-6), name


def test_accelerate_state(tmp_path: Path) -> None:
    """prepare, save_state, load_state: the next losses are the same to the bit."""
    from accelerate import Accelerator

    def steps(model: Any, optimizer: Any, accelerator: Any, count: int) -> list[float]:
        found = []
        for row in data(True)[:count]:
            batch = {name: torch.as_tensor(value)[None] for name, value in row.items()}
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    accelerator = Accelerator(cpu=True)
    model = model_in("all")
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    steps(model, optimizer, accelerator, 2)
    accelerator.save_state(str(tmp_path))
    expected = steps(model, optimizer, accelerator, 3)
    assert steps(model, optimizer, accelerator, 3) != expected
    accelerator.load_state(str(tmp_path))
    assert steps(model, optimizer, accelerator, 3) == expected
    assert (tmp_path / "model.safetensors").stat().st_size < 400_000


# ------------------------------------------------------------------------------------------------ state dicts


def test_state_dicts_leave_out_the_base_and_load_strictly() -> None:
    model, other = mixture("t5"), mixture("t5", seed=4)
    for parameter in other.routers.parameters():
        parameter.data.zero_()
    base = {name: p.clone() for name, p in other.base_model.named_parameters() if "lora_" not in name}
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    parameters = dict(other.base_model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in base.items())
    partial = model.state_dict()
    partial.pop(next(name for name in partial if name.endswith("lora_A")))
    with pytest.raises(RuntimeError, match="Missing key.*lora_A"):
        other.load_state_dict(partial)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**model.state_dict(), "x": torch.ones(1)})
    full = {**model.state_dict(), **{f"base_model.{k}": v for k, v in model.base_model.state_dict().items()}}
    other.load_state_dict(full)


def test_what_is_trained_of_the_base_is_kept() -> None:
    model = mixture("llama")
    model.base_model.model.norm.weight.requires_grad_(True)
    assert "base_model.model.norm.weight" in model.state_dict()


def test_a_state_of_other_adapters_is_refused() -> None:
    model = mixture("llama", adapters=("a", "b"))
    before = state(model)
    for other, message in [
        (mixture("llama", adapters=("b", "a")), r"adapters \['b', 'a'\], this model has \['a', 'b'\]"),
        (mixture("llama", adapters=("a", "b"), target_modules=["q_proj"]), "other layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(other.state_dict())
    other = mixture("llama", adapters=("a", "b"))
    other.set_adapter_scale("b", 0.25)
    model.load_state_dict(other.state_dict())
    assert model.adapter_scale("b") == 0.25
    assert MoAConfig(target_modules="all-linear", r=4) == model.moa_config
    assert before.keys() == state(model).keys()
