"""How much slower is a whole transformer with routed adapters than without? Beside what PEFT offers."""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import floor
from benchmarks.options import Functions, Options, Trial
from benchmarks.record import OURS, PLAIN, Case
from moa_ops import MoAConfig, MoAModel, get_moa_model

PEFT_ONE, PEFT_MIXED, PEFT_ARROW = "PEFT, one adapter", "PEFT, mixed batch", "PEFT, Arrow top-2"
ROWS, TOKENS, PROMPT, NEW = 4, 128, 32, 16
RANK = 16
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 1024}


@dataclass(frozen=True)
class Point:
    """One way to run the model. Label, adapters of r=16 on all seven linears, and settings of the router."""

    label: str
    aim: float
    experts: int = 8
    routing: tuple[tuple[str, Any], ...] = ()
    kind: str = "forward"  # "training", "decode"
    by_id: bool = False


TOKEN_TOP_2 = (("routing_level", "token"), ("top_k", 2), ("norm_topk_prob", True))
POINTS = (
    Point("forward token top-2 E=8", 1.10, routing=TOKEN_TOP_2),
    Point("forward token top-2 E=64", 1.3 * 1.10, experts=64, routing=TOKEN_TOP_2),
    Point("forward sequence top-1 E=8", 1.08),
    Point("forward by id 4 of E=8", 1.08, by_id=True),
    Point("training step token top-2 E=8", 1.20, routing=TOKEN_TOP_2, kind="training"),
    Point("decode token top-2 E=8", 1.2, routing=TOKEN_TOP_2, kind="decode"),
    Point("decode sequence top-1 E=8", 1.2, kind="decode"),
    Point("decode by id E=8", 1.2, kind="decode", by_id=True),
)

QUICK = POINTS[:1]


def trials(options: Options) -> Iterator[Trial]:
    """float32: the model and, where installed, PEFT's ways, all over the same weights."""
    if importlib.util.find_spec("transformers") is None:
        print("model: skipped, transformers is not installed")
        return
    for point in POINTS:
        if options.quick and point not in QUICK:
            continue
        case = Case("model", point.label, "float32", PLAIN, facts={"aim": point.aim})
        names = (PLAIN, OURS, PEFT_ONE, PEFT_MIXED, PEFT_ARROW)
        prepare = lambda point=point, case=case: _prepare(point, case)  # noqa: E731
        yield Trial(case, prepare, names, grad=point.kind == "training")


@functools.cache
def _base() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return (
        LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=16, **tokens)).eval().requires_grad_(False)
    )


def model_floor(base: nn.Module, point: Point) -> float:
    """The least time over the plain model's: arithmetic of all adapters and routers over that of all linears.

    Left out: attention, norms, embeddings and Python, which the plain model has too, so that the true floor
    is nearer to 1; and routers that decide once per sequence. In decoding it is the ratio of the bytes, too.
    """
    sizes = {name: m.weight.shape for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    routing = dict(point.routing)
    adapters = sum(sum(size) for name, size in sizes.items() if name != "lm_head")
    extra = routing.get("top_k", 1) * RANK * adapters
    if routing.get("routing_level") == "token":  # one per block
        extra += point.experts * SIZES["hidden_size"] * SIZES["num_hidden_layers"]
    return floor(extra / sum(size.numel() for size in sizes.values()), point.kind == "training")


def _share(base: nn.Module) -> nn.Module:
    """Another tree of modules over the same parameters."""
    return copy.deepcopy(base, memo={id(p): p for p in base.parameters()})


def mixture(base: nn.Module, experts: int, **routing: Any) -> MoAModel:
    """The base with filled adapters and routers that prefer no expert."""
    model = get_moa_model(
        _share(base), MoAConfig(r=RANK, target_modules="all-linear", num_experts=experts, **routing)
    )
    with torch.no_grad():
        for layer in model.layers.values():
            layer.lora_B.normal_(std=0.02)
        for router in model.routers.values():
            router.weight.normal_()
    return model.eval()


def _prepare(point: Point, case: Case) -> Functions:
    base = _base()
    model = mixture(base, point.experts, **dict(point.routing))
    others = _peft(model, base, point) if importlib.util.find_spec("peft") else {}
    if not others:
        case.variants[PEFT_ONE] = {"absent": "peft is not installed"}
    case.facts["floor"] = model_floor(base, point)
    case.yardsticks = [name for name in others if name != PEFT_MIXED]
    names = [f"expert_{2 * row + 1}" for row in range(ROWS)]
    ours = {"adapter_names": names[: 1 if point.kind == "decode" else ROWS]} if point.by_id else {}
    runs = {PLAIN: (base, {}), OURS: (model, ours), **others}
    if point.kind == "training":
        model.set_trainable(experts=True, router=True)
    step = {"forward": _forward, "training": _training, "decode": _decode}[point.kind]
    return {name: step(*what) for name, what in runs.items()}


def _forward(model: nn.Module, arguments: dict[str, Any]) -> Callable[[], object]:
    ids = torch.randint(SIZES["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))

    def call() -> object:
        with torch.no_grad():
            return model(input_ids=ids, **arguments)

    return call


def _training(model: nn.Module, arguments: dict[str, Any]) -> Callable[[], object]:
    """Forward and backward, the base frozen; its inputs take a gradient, so that all blocks have one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SIZES["vocab_size"], (ROWS, TOKENS), generator=generator)
    x = torch.randn(ROWS, TOKENS, SIZES["hidden_size"], generator=generator).requires_grad_()
    wanted: list[Tensor] = [x, *(p for p in model.parameters() if p.requires_grad)]

    def call() -> object:
        return torch.autograd.grad(model(inputs_embeds=x, labels=ids, **arguments).loss, wanted)

    return call


def _decode(model: nn.Module, arguments: dict[str, Any]) -> Callable[[], object]:
    """A prompt of PROMPT tokens and NEW more, greedily, with KV cache."""
    ids = torch.randint(SIZES["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return lambda: model.generate(input_ids=ids, **options, **arguments)


def _peft(model: MoAModel, base: nn.Module, point: Point) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """What PEFT has nearest to this point: one adapter; by id a mixed batch; token top-2 its Arrow."""
    import peft

    folder = tempfile.TemporaryDirectory()
    names = model.adapters[:8]
    for name in names:
        model.export_peft_adapter(name, Path(folder.name) / name)
    paths = [str(Path(folder.name) / name) for name in names]
    training = point.kind == "training"
    one = peft.PeftModel.from_pretrained(_share(base), paths[0], "expert_0", is_trainable=training)
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {PEFT_ONE: (one, {})}
    if point.by_id and point.kind == "forward":
        mixed = peft.PeftModel.from_pretrained(_share(base), paths[0], "expert_0")
        for name, path in zip(names[1:], paths[1:], strict=True):
            mixed.load_adapter(path, name)
        found[PEFT_MIXED] = mixed.eval(), {"adapter_names": [names[2 * row + 1] for row in range(ROWS)]}
    if point.routing and point.experts == 8 and not training and hasattr(peft, "create_arrow_model"):
        config = peft.ArrowConfig(top_k=2, router_temperature=1.0)
        arrow = peft.create_arrow_model(
            base_model=_share(base), task_specific_adapter_paths=paths, arrow_config=config
        )
        found[PEFT_ARROW] = arrow.eval(), {}
    folder.cleanup()
    return found
