"""The six benefits claimed for mixtures of LoRAs, each shown with numbers on a small model of real text.

One small Llama over bytes is pretrained on text found on this machine; one adapter per domain is trained,
alone, saved, and loaded into one mixture; its routers are trained with domain labels. Losses are bits per
byte on held-out files, over the second half of each window; routers read the first half. Each test prints its
numbers (``-s``) and writes them to its report (``--junit-xml``). One thread: the model is too small for two.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_ops import MoAConfig, MoAModel, get_moa_model

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from corpus import CONTEXT, Corpus, load_corpus, random_windows
from train import FAST, build_base, pretrain

DOMAINS = ("python", "cpp", "reference", "arithmetic")
HALF = CONTEXT // 2
READ = torch.arange(CONTEXT) < HALF  # what a router may see of a window
CONFIG = MoAConfig(r=8, lora_alpha=16, target_modules="all-linear")
Bits = dict[str, float]


@dataclass
class Trained:
    """What all tests start from, and leave as it is: changes are made to copies over the same base."""

    corpus: Corpus
    base: nn.Module
    folder: Path
    base_bits: Bits
    oracle: Bits

    def mixture(self) -> MoAModel:
        """The mixture, over the base's own tensors."""
        return MoAModel.from_pretrained(share(self.base), self.folder).eval()


def share(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def train(model: MoAModel, steps: int, lr: float, batch: Callable[[], dict[str, Any]]) -> None:
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 5) * (1 - step / steps)
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def batches(corpus: Corpus, names: Sequence[str], rows: int, seed: int) -> Callable[[], dict[str, Any]]:
    """Windows of these domains in turn, with labels."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> dict[str, Any]:
        streams = [corpus.domains[names[row % len(names)]].adapt for row in range(rows)]
        windows = torch.cat([random_windows(stream, 1, CONTEXT, generator) for stream in streams])
        return {"input_ids": windows, "labels": windows}

    return batch


@torch.no_grad()
def bits(run: Callable[[Tensor], Any], windows: Tensor) -> float:
    logits = run(windows.long()).logits[:, HALF - 1 : -1]
    return F.cross_entropy(logits.transpose(1, 2), windows[:, HALF:].long()).item() / math.log(2)


def routed(model: MoAModel) -> Callable[[Tensor], Any]:
    return lambda windows: model(input_ids=windows, routing_mask=READ.expand(windows.shape))


def by_id(model: MoAModel, name: str) -> Callable[[Tensor], Any]:
    return lambda windows: model(input_ids=windows, adapter_names=[name] * len(windows))


def per_domain(corpus: Corpus, run: Callable[[str], Callable[[Tensor], Any]], every: int = 1) -> Bits:
    """Bits of each domain, on every ``every``-th of its held-out windows."""
    return {name: bits(run(name), corpus.domains[name].heldout[::every]) for name in DOMAINS}


def mean(values: Bits) -> float:
    return sum(values.values()) / len(values)


def rounded(values: Bits) -> Bits:
    return {name: round(value, 3) for name, value in values.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    corpus = load_corpus(pretrain_bytes=FAST.pretrain_bytes, adapt_bytes=400_000, heldout_windows=48)
    torch.manual_seed(0)
    base = build_base(FAST)
    pretrain(base, corpus.pretrain, FAST, lambda loss: None)
    base.eval()
    folder = tmp_path_factory.mktemp("benefits")
    for seed, name in enumerate(DOMAINS):  # four separate trainings, each from the base alone
        torch.manual_seed(seed)
        alone = get_moa_model(share(base), CONFIG)
        alone.add_adapter(name)
        alone.set_adapter(name)
        alone.set_trainable(experts=True, router=False)
        train(alone, 40, 5e-3, batches(corpus, [name], 2, seed))
        alone.export_peft_adapter(name, folder / "adapters" / name)
    model = get_moa_model(share(base), CONFIG)
    for name in DOMAINS:
        model.load_adapter(folder / "adapters" / name, name)
    prompts = {name: batches(corpus, [name], 16, 5)()["input_ids"][:, :HALF] for name in DOMAINS}
    model.init_routers({name: {"input_ids": text} for name, text in prompts.items()})
    model.set_trainable(experts=False, router=True)
    draw = batches(corpus, DOMAINS, 16, 9)
    ids = torch.arange(16) % len(DOMAINS)

    def labelled() -> dict[str, Any]:
        prompts = draw()["input_ids"][:, :HALF]
        return {"input_ids": prompts, "domain_ids": ids, "routing_mode": "teacher_forced"}

    train(model, 60, 2e-2, labelled)
    model.save_pretrained(folder / "mixture")
    base_bits = per_domain(corpus, lambda name: lambda windows: base(input_ids=windows))
    oracle = per_domain(corpus, lambda name: by_id(model, name))
    return Trained(corpus, base, folder / "mixture", base_bits, oracle)


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    def say(**numbers: object) -> None:
        for name, value in numbers.items():
            record_property(name, value)
            print(f"  {name}: {value}")

    return say


def test_1_multi_task(trained: Trained, report: Callable[..., None]) -> None:
    """Adapters trained apart, composed without copying the base, serve all tasks, found without labels."""
    model = trained.mixture()
    tensors = {p.data_ptr() for p in trained.base.parameters()}
    found = [p for name, p in model.base_model.named_parameters() if "lora_" not in name]
    assert {p.data_ptr() for p in found} == tensors
    composed = per_domain(trained.corpus, lambda name: routed(model))
    hits = {}
    for expert, name in enumerate(DOMAINS):
        with torch.no_grad():
            logits = routed(model)(trained.corpus.domains[name].heldout.long()).moa_router_logits
        hits[name] = torch.stack([z.argmax(-1) == expert for z in logits.values()]).float().mean().item()
    report(base=rounded(trained.base_bits), composed=rounded(composed), oracle=rounded(trained.oracle))
    report(routed_to_its_own_adapter=rounded(hits), chance=1 / len(DOMAINS))
    gain = mean(trained.base_bits) - mean(trained.oracle)
    assert gain > 0.2
    assert mean(trained.base_bits) - mean(composed) > 0.7 * gain
    assert sum(composed[name] < trained.base_bits[name] for name in DOMAINS) >= len(DOMAINS) - 1
    assert mean(hits) > 0.55


def test_2_parameter_efficiency(trained: Trained, report: Callable[..., None], capsys: Any) -> None:
    """All adapters and routers together are a fraction of one model, in parameters and on disk."""
    model = trained.mixture()
    sizes = model.num_parameters_by_kind()
    per_adapter = sizes["adapters"] // len(DOMAINS)
    on_disk = sum(path.stat().st_size for path in trained.folder.rglob("*") if path.is_file())
    base_bytes = sum(p.numel() * p.element_size() for p in trained.base.parameters())
    assert sizes["base"] == sum(p.numel() for p in trained.base.parameters())
    model.set_adapter(DOMAINS[0])
    model.set_trainable(experts=True, router=False)
    assert model.num_parameters_by_kind()["trainable"] == per_adapter
    model.print_trainable_parameters()
    assert f"trainable params: {per_adapter:,}" in capsys.readouterr().out
    report(**sizes, per_adapter=per_adapter, mixture_on_disk=on_disk, four_copies=len(DOMAINS) * base_bytes)
    assert per_adapter < 0.15 * sizes["base"]
    assert sizes["routers"] < 0.01 * sizes["base"]
    assert on_disk < 0.2 * len(DOMAINS) * base_bytes


def test_3_joint_tuning(trained: Trained, report: Callable[..., None]) -> None:
    """Trained on together from there, the composition gains over what it was; beside the oracle, per task."""
    model = trained.mixture()
    before = per_domain(trained.corpus, lambda name: routed(model))
    model.update_routing(top_k=2, norm_topk_prob=True)
    model.set_trainable(experts=True, router=True)
    draw = batches(trained.corpus, DOMAINS, 4, 11)
    ids = torch.arange(4) % len(DOMAINS)
    train(model, 30, 2e-3, lambda: {**draw(), "domain_ids": ids})
    after = per_domain(trained.corpus, lambda name: routed(model))
    against_oracle = {name: after[name] - trained.oracle[name] for name in DOMAINS}
    report(before=rounded(before), after=rounded(after), minus_oracle=rounded(against_oracle))
    assert mean(after) < mean(before)
    assert mean(against_oracle) < 0.1


def test_4_flexible_composition(trained: Trained, report: Callable[..., None]) -> None:
    """Adapters leave, come back and merge; each such model has the loss that its adapters say it should."""
    model, gone = trained.mixture(), "arithmetic"
    windows = trained.corpus.domains[gone].heldout
    with_it = bits(routed(model), windows)
    outputs = {name: bits(by_id(model, name), windows) for name in DOMAINS}
    model.delete_adapter(gone)
    without = bits(routed(model), windows)
    model.load_adapter(trained.folder / gone, gone)
    assert {name: bits(by_id(model, name), windows) for name in DOMAINS} == outputs
    report(all_adapters=round(with_it, 3), without_its_own=round(without, 3))
    assert without > with_it + 0.1

    kinds: dict[str, dict[str, Any]] = {
        "linear": {}, "cat": {}, "svd": {"svd_rank": 32}, "ties": {"density": 0.5},
        "dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5}, "magnitude_prune": {"density": 0.5},
    }  # fmt: skip
    merged = {}
    uniform = [1 / len(DOMAINS)] * len(DOMAINS)
    for kind, options in kinds.items():
        model.add_weighted_adapter(DOMAINS, uniform, kind, kind, **options)
        merged[kind] = mean(per_domain(trained.corpus, lambda name, kind=kind: by_id(model, kind), every=3))
        model.delete_adapter(kind)
    report(base=round(mean(trained.base_bits), 3), oracle=round(mean(trained.oracle), 3), **rounded(merged))
    assert merged["linear"] == pytest.approx(merged["cat"], abs=1e-4)
    assert merged["linear"] == pytest.approx(merged["svd"], abs=1e-4)
    for kind, loss in merged.items():
        assert mean(trained.oracle) < loss < mean(trained.base_bits) + 0.2, kind
    assert merged["linear"] < mean(trained.base_bits)

    draw = batches(trained.corpus, [gone], 2, 13)
    weights = model.learn_adapter_weights(
        DOMAINS, [draw() for _ in range(4)], initial=uniform, steps=12, lr=0.1
    )
    model.add_weighted_adapter(DOMAINS, weights, "learned")
    model.add_weighted_adapter(DOMAINS, uniform, "uniform")
    learned, plain = (bits(by_id(model, name), windows) for name in ("learned", "uniform"))
    report(learned_weights=[round(w, 2) for w in weights], learned=round(learned, 3), uniform=round(plain, 3))
    assert learned < plain - 0.05
    assert max(weights) == weights[DOMAINS.index(gone)]


def test_5_fast_adaptation(trained: Trained, report: Callable[..., None]) -> None:
    """One adapter learns on, inside the mixture, in seconds; every other output by id stays, bit for bit."""
    model, name = trained.mixture(), "reference"
    windows = trained.corpus.domains[name].heldout
    probe = torch.cat([domain.heldout[:1] for domain in trained.corpus.domains.values()]).long()
    others = [other for other in (*DOMAINS, "__base__") if other != name]
    with torch.no_grad():
        before = {other: by_id(model, other)(probe).logits for other in others}
    loss = bits(by_id(model, name), windows)
    model.set_adapter(name)
    model.set_trainable(experts=True, router=False)
    start = time.perf_counter()
    train(model, 30, 5e-3, batches(trained.corpus, [name], 2, 17))
    seconds = time.perf_counter() - start
    model.set_adapter(None)
    adapted = bits(by_id(model, name), windows)
    report(before=round(loss, 3), after=round(adapted, 3), seconds=round(seconds, 1), steps=30)
    assert adapted < loss - 0.02
    with torch.no_grad():
        assert all(torch.equal(by_id(model, other)(probe).logits, before[other]) for other in others)


def test_6_computational_efficiency(trained: Trained, report: Callable[..., None]) -> None:
    """At fixed k, time hardly grows with the number of adapters; those not chosen are not computed."""
    few, many = trained.mixture(), trained.mixture()
    for number in range(28):
        many.add_adapter(f"more-{number}")
    windows = trained.corpus.domains["arithmetic"].heldout[:8]

    # All that the router did not choose is NaN, and nothing of it shows.
    with torch.no_grad():
        expected = routed(few)(windows.long())
        chosen = torch.cat([z.argmax(-1) for z in expected.moa_router_logits.values()]).unique()
        rest = [expert for expert in range(len(DOMAINS)) if expert not in chosen]
        assert rest
        for layer in few.layers.values():
            layer.lora_A[rest] = float("nan")
            layer.lora_B[rest] = float("nan")
        assert torch.equal(routed(few)(windows.long()).logits, expected.logits)
    dense = trained.mixture()
    dense.update_routing(top_k=None)

    runs = {"adapters 4, top 1": trained.mixture(), "adapters 32, top 1": many, "adapters 4, all": dense}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(8):
        for name, model in runs.items():
            start = time.perf_counter()
            bits(routed(model), windows)
            times[name].append(time.perf_counter() - start)
    best = {name: min(found) for name, found in times.items()}
    report(**{name: f"{1000 * seconds:.1f} ms" for name, seconds in best.items()}, unchosen=rest)
    assert best["adapters 32, top 1"] < 1.6 * best["adapters 4, top 1"]
