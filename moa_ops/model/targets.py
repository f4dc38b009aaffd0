"""Which modules of a model take adapters, which block each of them is in, and how wide a block's input is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier")  # a model's own fresh heads, as PEFT names them; "all-linear" leaves them out


@dataclass(frozen=True)
class Target:
    """A linear that takes adapters.

    paths: every path under which the module is found (several where it is shared), the first one its name.
    block: the path of the repeated block it is in, or ``None``.
    head: whether it is an output embedding or a classification head, which "all-linear" leaves out.
    """

    module: nn.Module
    paths: tuple[str, ...]
    in_features: int
    out_features: int
    block: str | None
    head: bool

    @property
    def path(self) -> str:
        """Its name."""
        return self.paths[0]


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that maps ``[..., in]`` to ``[..., out]`` linearly; ``None`` for any other.

    Known are ``nn.Linear``, what derives from it or has its two attributes (quantised linears), and
    transformers' ``Conv1D``. The output projection of ``nn.MultiheadAttention`` is never called and so is
    none.
    """
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.weight.shape[0], module.nf
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in sizes) and not isinstance(module, (nn.Bilinear, nn.Embedding)):
        return sizes
    return None


def matches(path: str, names: str | Sequence[str] | None) -> bool:
    """Whether ``names`` choose the module at ``path``: a regular expression for all of it, or ends of it."""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of ``path`` from a dot on, as PEFT reads them."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?(?:{pattern})", path):
            return value
    return default


def find_linears(model: nn.Module) -> dict[str, Target]:
    """Every linear of the model by its path; shared ones once."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and linear_features(module):
            paths.setdefault(id(module), []).append(path)
            modules[id(module)] = module
    heads = _output_embeddings(model)
    return {
        names[0]: Target(
            modules[key],
            tuple(names),
            *linear_features(modules[key]),
            block_of(model, names[0]),
            key in heads,
        )
        for key, names in paths.items()
    }


def select(
    model: nn.Module,
    linears: Mapping[str, Target],
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
) -> list[Target]:
    """Those of the model's ``linears`` that ``target_modules`` chooses and ``exclude_modules`` leaves.

    Raises ``ValueError``, with the nearest names there are, where a name or expression chooses none.
    """
    if target_modules == ALL_LINEAR:
        found = [t for t in linears.values() if not t.head]
    else:
        names = [target_modules] if isinstance(target_modules, str) else target_modules
        for name in names:
            one = name if isinstance(target_modules, str) else [name]
            if not any(matches(path, one) for t in linears.values() for path in t.paths):
                raise ValueError(_nothing(name, isinstance(target_modules, str), model, linears))
        found = [t for t in linears.values() if any(matches(path, target_modules) for path in t.paths)]
    chosen = [t for t in found if not any(matches(path, exclude_modules) for path in t.paths)]
    if not chosen:
        raise ValueError(
            f"target_modules={target_modules!r} without exclude_modules={exclude_modules!r} leaves no linear"
        )
    return chosen


def _output_embeddings(model: nn.Module) -> set[int]:
    get = getattr(model, "get_output_embeddings", None)
    try:
        heads = [get()] if callable(get) else []
    except (AttributeError, NotImplementedError):
        heads = []
    heads += [getattr(model, name, None) for name in HEADS]
    return {id(head) for head in heads if head is not None}


def _nothing(name: str, expression: bool, model: nn.Module, linears: Mapping[str, Target]) -> str:
    ends = sorted({path.rpartition(".")[2] for t in linears.values() for path in t.paths})
    text = f"target_modules: no linear of this {type(model).__name__} matches {name!r}"
    if expression and any(matches(path, [name]) for path in linears):
        return f"{text}, which is a regular expression for a whole path; did you mean [{name!r}]?"
    module = next((m for p, m in model.named_modules() if p and matches(p, [name])), None)
    if module is not None:
        return f"{text}; a module is called so, but it is a {type(module).__name__}"
    near = difflib.get_close_matches(name.rpartition(".")[2], ends, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"{text}{meant} Its linears are called {ends}" if meant else f"{text}; its linears are called {ends}"
    )


def block_of(model: nn.Module, path: str) -> str | None:
    """The outermost child of a list of modules (``nn.ModuleList``, ``nn.Sequential``) that holds ``path``.

    ``None`` where there is none, and where the linear is that child itself.
    """
    parts = path.split(".")
    module = model
    for depth, part in enumerate(parts[:-1]):
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            return ".".join(parts[: depth + 1])
        module = module.get_submodule(part)
    return None


def block_width(model: nn.Module, block: str) -> int:
    """The width of a block's input: the model's hidden size where one of its linears reads that, else what
    its first linear reads.
    """
    widths = [features[0] for m in model.get_submodule(block).modules() if (features := linear_features(m))]
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text, "hidden_size", None)
    return hidden if hidden in widths else widths[0]


def replace_module(model: nn.Module, paths: Sequence[str], module: nn.Module) -> None:
    """Puts ``module`` at all ``paths``."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
