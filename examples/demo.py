"""The main job: a mixture of LoRAs on real text, trained and compared on this machine's CPU.

    make demo                          about four minutes on two cores
    python examples/demo.py --fast     under a minute, for CI: the same steps on a smaller model

1. A small Llama over bytes is pretrained on text found on this machine.
2. One LoRA per domain is trained, each alone, and saved as a file.
3. They are composed into one model, which shares the base's weights.
4. One router per block learns the domain from half a window, teacher-forced: loss = LM + cross-entropy.
5. The mixture is compared with the base, with the right adapter by id, and with one LoRA on mixed data.

A toy trained from scratch mirrors the layout of the Mixture-of-LoRAs paper (2403.03432), not its numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from corpus import DESCRIPTIONS, DOMAINS, Corpus, load_corpus, package_versions
from evaluate import (
    Scores,
    arithmetic_floor,
    by_id_run,
    expert_shares,
    outputs_by_id,
    plain_run,
    routed_run,
    router_accuracy,
    samples,
    score,
    slowdown,
    unigram_bits,
)
from report import METHODS, Stages, bits_table, plot, print_samples, shares_table
from rich.console import Console
from rich.markup import escape
from torch import nn
from train import FAST, PROMPT, Settings, build_base, pretrain, share, train_adapter, train_router

from moa_ops import MoAConfig, MoAModel, get_moa_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a mixture of LoRAs on real text and compare it.")
    parser.add_argument("--fast", action="store_true", help="a smaller model and fewer steps: under a minute")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder for plot, numbers and adapters"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all weights, windows and samples")
    arguments = parser.parse_args()
    settings = Settings(**{**asdict(FAST if arguments.fast else Settings()), "seed": arguments.seed})
    arguments.out.mkdir(parents=True, exist_ok=True)
    start, console = time.perf_counter(), Console()
    console.print(
        f"moa_ops on {torch.get_num_threads()} threads, CPU kernels: {torch.ops.moa_ops.cpu_isa()}",
        highlight=False,
    )
    torch.manual_seed(settings.seed)
    transformers.utils.logging.disable_progress_bar()

    with Stages(console) as stages:
        with stages.stage("reading text on this machine"):
            corpus = load_corpus(
                pretrain_bytes=settings.pretrain_bytes,
                adapt_bytes=settings.adapt_bytes,
                heldout_windows=settings.heldout_windows,
                seed=settings.seed,
            )
        with stages.stage("pretraining the base", settings.pretrain_steps) as step:
            base = build_base(settings)
            pretrain(base, corpus.pretrain, settings, step)
            base.save_pretrained(arguments.out / "base")

        config = MoAConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=TARGETS, top_k=1)
        for name in DOMAINS:
            with stages.stage(f"LoRA alone: {name}", settings.adapter_steps) as step:
                single = get_moa_model(share(base), config)
                single.add_adapter(name)
                single.set_adapter(name)
                train_adapter(single, [corpus.domains[name].adapt], settings.adapter_steps, settings, step)
                single.export_peft_adapter(name, arguments.out / "adapters" / name)
        with stages.stage("one LoRA on mixed data", len(DOMAINS) * settings.adapter_steps) as step:
            mixed = get_moa_model(share(base), config)
            mixed.add_adapter("mixed")
            mixed.set_adapter("mixed")
            streams = [corpus.domains[name].adapt for name in DOMAINS]
            train_adapter(mixed, streams, len(DOMAINS) * settings.adapter_steps, settings, step)

        with stages.stage("routers, with domain labels", settings.router_steps) as step:
            moa = get_moa_model(share(base), config)
            for name in DOMAINS:
                moa.load_adapter(arguments.out / "adapters" / name, name)
            train_router(moa, corpus, settings, step)

        with stages.stage("comparing on held-out files", len(DOMAINS)) as step:
            scores = compare(base, mixed, moa, corpus, step)
        with stages.stage("each adapter on each domain", len(DOMAINS)) as step:
            matrix = adapter_matrix(moa, corpus, scores, settings, step)
        with stages.stage("composing, updating, writing") as step:
            facts = properties(base, moa, corpus, settings)
            texts = samples(moa, corpus, settings.sample_bytes, settings.seed)
        with stages.stage("timing, interleaved"):
            speeds = speed(base, moa, config, settings)
    seconds = time.perf_counter() - start

    bits = {
        "unigram": unigram_bits(corpus),
        **{method: {name: s.mean for name, s in row.items()} for method, row in scores.items()},
    }
    errors = {
        method: {name: (s.bits.std() / len(s.bits) ** 0.5).item() for name, s in row.items()}
        for method, row in scores.items()
    }
    shares = expert_shares(scores["moa"], len(DOMAINS))
    blocks = router_accuracy(scores["moa"], moa.adapters)
    accuracy = {name: shares[i, i].item() for i, name in enumerate(DOMAINS)}
    plot(arguments.out / "demo.png", bits, errors, shares, matrix, list(DOMAINS), moa.adapters)
    numbers = {
        "bits_per_byte": bits,
        "standard_error": errors,
        "router_accuracy_per_block": blocks,
        "router_accuracy_per_domain": accuracy,
        "expert_shares": shares.tolist(),
        "adapter_by_domain_minus_base": matrix.tolist(),
        "properties": facts,
        "tokens_per_second": speeds,
        "samples": texts,
        "settings": asdict(settings),
        "corpus": corpus.record,
        "seconds": seconds,
        "stage_seconds": stages.seconds,
        "environment": environment(),
    }
    (arguments.out / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")

    console.print()
    console.print(bits_table(bits, accuracy))
    console.print(
        "unigram: the domain's byte frequencies alone. mixed: one LoRA of the same rank on all domains, "
        "for as many steps as all adapters together. oracle: the right adapter by id. routed: how often "
        f"routers chose the domain's own adapter; they read the first {PROMPT} bytes of a window, and all "
        f"columns count the bytes after them. By block: {', '.join(f'{a:.1%}' for a in blocks)}; "
        f"chance: {1 / len(DOMAINS):.1%}.\n",
        highlight=False,
    )
    console.print(shares_table(shares, list(DOMAINS), moa.adapters))
    print_samples(console, texts)
    print_benefits(console, bits, facts, speeds)
    console.print(
        f"\n{arguments.out / 'demo.png'}, {arguments.out / 'demo.json'} and {arguments.out / 'adapters'} "
        f"written; {seconds:.0f} s in all.",
        highlight=False,
    )


def compare(
    base: nn.Module, mixed: MoAModel, moa: MoAModel, corpus: Corpus, step
) -> dict[str, dict[str, Scores]]:
    """Every method on every domain's held-out windows."""
    scores: dict[str, dict[str, Scores]] = {method: {} for method in METHODS}
    for name, domain in corpus.domains.items():
        scores["base"][name] = score(plain_run(base), domain.heldout)
        scores["mixed"][name] = score(by_id_run(mixed, "mixed"), domain.heldout)
        scores["oracle"][name] = score(by_id_run(moa, name), domain.heldout)
        scores["moa"][name] = score(routed_run(moa), domain.heldout)
        step(scores["moa"][name].mean)
    return scores


def adapter_matrix(moa: MoAModel, corpus: Corpus, scores: dict, settings: Settings, step) -> torch.Tensor:
    """[domains, adapters]: bits per byte of each adapter by id, minus the base, on some held-out windows."""
    rows = []
    for name, domain in corpus.domains.items():
        windows = domain.heldout[: settings.matrix_windows]
        of_base = scores["base"][name].bits[: len(windows)].mean().item()
        rows.append([score(by_id_run(moa, adapter), windows).mean - of_base for adapter in moa.adapters])
        step()
    return torch.tensor(rows)


def properties(base: nn.Module, moa: MoAModel, corpus: Corpus, settings: Settings) -> dict[str, object]:
    """What the composition promises, checked: no base copied, adapters removed and updated one by one."""
    weights = dict(base.named_parameters())
    shared = {p.data_ptr() for p in moa.base_model.parameters()} & {p.data_ptr() for p in weights.values()}
    sizes = moa.num_parameters_by_kind()
    facts: dict[str, object] = {
        "base_parameters": sum(p.numel() for p in weights.values()),
        "base_tensors_copied": len(weights) - len(shared),
        "parameters_per_adapter": sizes["adapters"] // len(moa.adapters),
        "router_parameters": sizes["routers"],
    }
    probe = torch.cat([domain.heldout[:2] for domain in corpus.domains.values()])

    # Without the last adapter, then with it again.
    gone, kept = DOMAINS[-1], list(DOMAINS[:-1])
    windows = corpus.domains[gone].heldout[: settings.matrix_windows]
    others = torch.cat([corpus.domains[name].heldout[:4] for name in kept])
    before, others_before = score(routed_run(moa), windows).mean, score(routed_run(moa), others).mean
    by_id_before = outputs_by_id(moa, probe, list(DOMAINS))
    fewer = share(moa)
    fewer.delete_adapter(gone)
    by_id_fewer = outputs_by_id(fewer, probe, kept)
    facts["deleted"] = {
        "adapter": gone,
        "bits_before": before,
        "bits_after": score(routed_run(fewer), windows).mean,
        "others_before": others_before,
        "others_after": score(routed_run(fewer), others).mean,
        "others_by_id_identical": all(torch.equal(by_id_before[n], by_id_fewer[n]) for n in kept),
        "base_by_id_equals_plain": torch.equal(
            by_id_run(fewer, "__base__")(probe.long()).logits, base(input_ids=probe.long()).logits
        ),
    }

    # One adapter is trained further inside the composition.
    name = DOMAINS[0]
    updated = share(moa)
    updated.set_adapter(name)
    steps = max(4, settings.adapter_steps // 8)
    train_adapter(updated, [corpus.domains[name].adapt], steps, settings, lambda _: None, lr=1e-3, seed=4)
    updated.set_adapter(None)
    after = outputs_by_id(updated, probe, list(DOMAINS))
    facts["updated"] = {
        "adapter": name,
        "steps": steps,
        "changed": not torch.equal(by_id_before[name], after[name]),
        "others_by_id_identical": all(torch.equal(by_id_before[n], after[n]) for n in DOMAINS[1:]),
    }
    return facts


def speed(base: nn.Module, moa: MoAModel, config: MoAConfig, settings: Settings) -> dict[str, object]:
    """Tokens per second of the plain model, the mixture, and one with four times as many adapters."""
    many = get_moa_model(share(base), replace(config, num_experts=4 * len(DOMAINS)))
    for layer in many.layers.values():
        nn.init.normal_(layer.lora_B, std=1e-3)
    for router in many.routers.values():
        nn.init.normal_(router.weight)
    names = {"moa": moa, f"moa_{4 * len(DOMAINS)}_adapters": many}
    return {**slowdown(base, names, settings.timing_rounds), "floor": arithmetic_floor(moa)}


def print_benefits(console: Console, bits: dict, facts: dict, speeds: dict) -> None:
    """The six benefits claimed for mixtures of LoRAs, each with what this run shows."""
    count, gaps = len(DOMAINS), {name: bits["moa"][name] - bits["oracle"][name] for name in DOMAINS}
    mean = {method: sum(row.values()) / count for method, row in bits.items()}
    base, adapter, router = (
        facts[k] for k in ("base_parameters", "parameters_per_adapter", "router_parameters")
    )
    deleted, updated, reading = facts["deleted"], facts["updated"], speeds["reading"]
    more = next(key for key in reading if key.startswith("moa_"))
    yes = {True: "bit for bit the same", False: "NOT the same"}
    lines = [
        (
            "multi-task",
            f"{count} adapters trained apart, composed with {facts['base_tensors_copied']} base tensors "
            f"copied; mean bits per byte {mean['base']:.3f} base, {mean['mixed']:.3f} one LoRA on mixed "
            f"data, {mean['oracle']:.3f} oracle, {mean['moa']:.3f} MoA",
        ),
        (
            "parameters",
            f"base {base:,}, frozen; each adapter {adapter:,} ({adapter / base:.1%}), all routers together "
            f"{router:,}; {count} full copies would be {count * base:,}",
        ),
        (
            "single tasks",
            "MoA minus oracle, bits per byte (negative: better than the right adapter alone): "
            + ", ".join(f"{name} {gap:+.3f}" for name, gap in gaps.items()),
        ),
        (
            "composition",
            f"deleting {deleted['adapter']!r}: its text goes from {deleted['bits_before']:.3f} to "
            f"{deleted['bits_after']:.3f}, the other domains from {deleted['others_before']:.3f} to "
            f"{deleted['others_after']:.3f}; by id, the others are {yes[deleted['others_by_id_identical']]}",
        ),
        (
            "adaptation",
            f"{updated['steps']} more steps on {updated['adapter']!r} alone inside the mixture: it "
            f"{'changed' if updated['changed'] else 'did not change'}; by id, the other {count - 1} are "
            f"{yes[updated['others_by_id_identical']]}",
        ),
        (
            "computation",
            f"reading {reading['plain']:,.0f} tokens/s plain, {reading['moa']:,.0f} routed over {count} "
            f"({reading['plain'] / reading['moa']:.2f} times slower), {reading[more]:,.0f} over {4 * count} "
            f"({reading['plain'] / reading[more]:.2f}); generating {speeds['generating']['plain']:,.0f} and "
            f"{speeds['generating']['moa']:,.0f}. Multiply-adds of the linears: {speeds['floor']:.2f} times, "
            "since this toy's layers are narrow",
        ),
    ]
    console.print("\n[bold]the six benefits claimed for mixtures of LoRAs, as this run shows them[/bold]")
    for number, (title, text) in enumerate(lines, 1):
        console.print(f"{number}. [cyan]{title}[/cyan]: {escape(text)}", highlight=False)


def environment() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_isa": torch.ops.moa_ops.cpu_isa(),
        "domains": DESCRIPTIONS,
        "packages": package_versions(("torch", "transformers", "numpy", "sympy", "networkx", "setuptools")),
    }


if __name__ == "__main__":
    main()
