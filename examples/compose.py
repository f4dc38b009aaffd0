"""PEFT LoRA folders become one routed model: load them, train the routers, generate, save.

    python examples/compose.py BASE --adapter NAME FOLDER TEXT --adapter NAME FOLDER TEXT ... [--out OUT]

BASE is a folder of transformers' ``save_pretrained`` (with a tokenizer; without one, text is read as bytes),
FOLDER one of PEFT's ``save_pretrained``, and TEXT a file with text of that adapter's domain. After the demo:

    python examples/compose.py demo_out/base \
        --adapter python demo_out/adapters/python examples/demo.py \
        --adapter licences demo_out/adapters/licences LICENSE
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from moa_ops import MoAConfig, MoAModel, get_moa_model

LENGTH, PROMPT, NEW = 64, 32, 48  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="Compose PEFT LoRA folders into one routed model.")
    parser.add_argument("base", type=Path)
    parser.add_argument(
        "--adapter", nargs=3, action="append", required=True, metavar=("NAME", "FOLDER", "TEXT")
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("composed"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    encode, decode = text_codec(arguments.base)
    base = AutoModelForCausalLM.from_pretrained(arguments.base)
    model = get_moa_model(base, MoAConfig(target_modules="all-linear"))
    texts: dict[str, torch.Tensor] = {}
    for name, folder, text in arguments.adapter:
        model.load_adapter(folder, name)  # ranks, alphas and linears may differ from folder to folder
        texts[name] = encode(Path(text).read_text())

    train_routers(model, texts, arguments.steps, arguments.out)
    model.print_trainable_parameters()
    show(model, texts, decode, arguments.out)

    model.save_pretrained(arguments.out)
    again = MoAModel.from_pretrained(AutoModelForCausalLM.from_pretrained(arguments.base), arguments.out)
    print(f"saved to {arguments.out} and read again: {again.adapters}")


def text_codec(folder: Path) -> tuple[Callable[[str], torch.Tensor], Callable[[torch.Tensor], str]]:
    """Text to ids and back, with the folder's tokenizer or as bytes."""
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return (lambda text: torch.tensor(tokenizer(text)["input_ids"])), tokenizer.decode
    return (
        lambda text: torch.tensor(list(text.encode())),
        lambda ids: bytes(ids.tolist()).decode(errors="replace"),
    )


def train_routers(model: MoAModel, texts: dict[str, torch.Tensor], steps: int, out: Path) -> None:
    """The adapters stay as they are; ``domain_ids`` tell the routers which of them a text is for."""
    rows = [
        {"input_ids": window, "labels": window, "domain_ids": expert}
        for expert, name in enumerate(model.adapters)
        for window in texts[name].unfold(0, LENGTH, LENGTH // 2)
    ]
    model.set_trainable(experts=False, router=True)
    settings = TrainingArguments(
        str(out / "trainer"), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=max(steps // 3, 1),
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows).train()


def show(model: MoAModel, texts: dict[str, torch.Tensor], decode: Callable, out: Path) -> None:
    """Each prompt, what the routed model writes after it, and where the routers send which domain."""
    model.eval()
    prompts = torch.stack([ids[-PROMPT:] for ids in texts.values()])
    mask = torch.ones_like(prompts)
    written = model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    with model.record_routing() as record, torch.no_grad():
        model(input_ids=prompts, attention_mask=mask, domain_ids=torch.arange(len(prompts)))
    for name, row in zip(texts, written, strict=True):
        print(f"--- {name}\n{decode(row[:PROMPT])} >>> {decode(row[PROMPT:])}")
    for place, stats in record.stats()["layers"].items():
        print(f"{place}: largest share {stats['largest_share']:.2f}, by domain {stats['domain_expert']}")
    out.mkdir(parents=True, exist_ok=True)
    record.plot(out / "routing.png")


if __name__ == "__main__":
    main()
