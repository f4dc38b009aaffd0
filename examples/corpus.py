"""Text for the demo, found on any machine that has Python, torch and what torch needs.

Nothing is downloaded and no text is stored in the repository. Each domain is a list of documents (one per
file); documents are ordered by a hash of their name, so that a split by file needs no list of names:

    held-out  the first documents of a domain; never trained on
    adapt     the next ones; what the LoRA adapters are trained on
    pretrain  other packages altogether; what the base model is trained on

Paragraphs that were seen before (compared by their letters and digits alone) are dropped. Held-out text is
read first, then adaptation, then pretraining, so no paragraph of one split occurs in another.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

CONTEXT = 256
DOMAINS = ("python", "cpp", "docstrings", "reference", "licences", "arithmetic")
DESCRIPTIONS = {
    "python": "sources of the standard library",
    "cpp": "C++ headers shipped inside torch",
    "docstrings": "docstrings of numpy, networkx and sympy",
    "reference": "the Python language reference (pydoc_data)",
    "licences": "licence and notice texts of installed packages",
    "arithmetic": "generated sums, differences and products",
}
_PRETRAIN_PACKAGES = ("setuptools", "transformers", "torch", "huggingface_hub", "rich", "pygments", "mpmath")
_SHORT_PARAGRAPH = 24  # letters and digits; shorter ones ("else:", "private:") may repeat


@dataclass(frozen=True)
class Document:
    """One file's text. ``name`` is relative to the place it was found in."""

    name: str
    text: str


@dataclass
class Domain:
    """Byte streams of one domain: ``adapt`` [N] uint8 and ``heldout`` [windows, CONTEXT] uint8."""

    adapt: Tensor
    heldout: Tensor
    record: dict[str, int | str]


@dataclass
class Corpus:
    """All text of one run: the pretraining stream [N] uint8, the domains, and a record of what was read."""

    pretrain: Tensor
    domains: dict[str, Domain]
    record: dict[str, object]


def load_corpus(*, pretrain_bytes: int, adapt_bytes: int, heldout_windows: int, seed: int = 0) -> Corpus:
    """Reads, deduplicates and splits the text. Raises RuntimeError where a domain has too little text."""
    seen: set[bytes] = set()
    readers = {name: reader(seed) for name, reader in _READERS.items()}
    heldout = {name: _heldout_windows(name, docs, seen, heldout_windows) for name, docs in readers.items()}
    adapt = {name: _fill(docs, seen, adapt_bytes) for name, docs in readers.items()}
    sources = [_fill(docs, seen, pretrain_bytes // 4) for docs in _pretraining_readers()]

    domains = {}
    for name in DOMAINS:
        text, files = adapt[name]
        if len(text) < 64 * CONTEXT:
            raise RuntimeError(
                f"domain {name!r} has only {len(text)} bytes of adaptation text on this machine; "
                f"{64 * CONTEXT} are needed. Is the package it comes from installed?"
            )
        windows, window_files = heldout[name]
        domains[name] = Domain(
            _tensor(text),
            windows,
            {
                "adapt_files": files,
                "adapt_bytes": len(text),
                "adapt_sha256": _sha256(text),
                "heldout_files": window_files,
                "heldout_windows": windows.shape[0],
                "heldout_sha256": _sha256(windows.numpy().tobytes()),
            },
        )
    pretrain = b"".join(text for text, _ in sources)
    record = {
        "pretrain_bytes": len(pretrain),
        "pretrain_files": sum(files for _, files in sources),
        "pretrain_sha256": _sha256(pretrain),
        "domains": {name: domain.record for name, domain in domains.items()},
    }
    return Corpus(_tensor(pretrain), domains, record)


def random_windows(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``count`` windows of a byte stream at random places: [count, length] int64."""
    starts = torch.randint(len(stream) - length, (count, 1), generator=generator)
    return stream[starts + torch.arange(length)].long()


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed version of each package, "absent" where there is none."""
    installed = {}
    for name in names:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "absent"
    return installed


# Readers: each yields the documents of one domain, in an order that depends on their names alone.


def _standard_library(seed: int) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "ensurepip",
        "__pycache__",
    )
    paths = [p for p in root.rglob("*.py") if not set(skip) & set(p.relative_to(root).parts)]
    return _read(root, paths)


def _torch_headers(seed: int) -> Iterator[Document]:
    root = _package("torch") / "include"
    paths = [p for top in ("ATen", "c10", "torch") for p in (root / top).rglob("*.h")]
    return _read(root, [p for p in paths if "ATen/ops" not in p.as_posix()])


def _docstrings(seed: int) -> Iterator[Document]:
    for package in _interleave([_read(_package(p), _sources(p)) for p in ("numpy", "networkx", "sympy")]):
        try:
            tree = ast.parse(package.text)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(text for text in found if text and len(text) > 200)
        if text:
            yield Document(package.name, text)


def _language_reference(seed: int) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics, key=_order):
        yield Document(name, topics[name])


def _licences(seed: int) -> Iterator[Document]:
    root = _package("torch").parent
    paths = [
        p
        for folder in root.glob("*.dist-info")
        for p in folder.rglob("*")
        if re.match(r"(LICEN[CS]E|NOTICE|COPYING)", p.name) and p.suffix in ("", ".txt", ".md", ".rst")
    ]
    return _read(root, paths)


def _arithmetic(seed: int) -> Iterator[Document]:
    rng = random.Random(seed)
    operators: dict[str, Callable[[int, int], int]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }
    for number in range(10_000):
        lines = []
        for _ in range(100):
            sign = rng.choice("+-*")
            a, b = rng.randrange(10 if sign == "*" else 1000), rng.randrange(100)
            lines.append(f"{a} {sign} {b} = {operators[sign](a, b)}")
        yield Document(f"sheet {number}", "\n".join(lines))


_READERS: dict[str, Callable[[int], Iterator[Document]]] = {
    "python": _standard_library,
    "cpp": _torch_headers,
    "docstrings": _docstrings,
    "reference": _language_reference,
    "licences": _licences,
    "arithmetic": _arithmetic,
}


def _pretraining_readers() -> list[Iterator[Document]]:
    """Two parts Python of other packages, one part C++ headers of others, one part read-me files."""
    packages = [p for p in _PRETRAIN_PACKAGES if util.find_spec(p)]
    python = _interleave([_read(_package(p), _sources(p)) for p in packages])
    include = _package("torch") / "include"
    headers = [
        p for p in include.rglob("*.h") if p.relative_to(include).parts[0] not in ("ATen", "c10", "torch")
    ]
    site = _package("torch").parent
    readmes = _read(site, list(site.glob("*.dist-info/METADATA")))
    return [python, python, _read(include, headers), readmes]


# Small parts.


def _package(name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(
            f"the demo reads text of the package {name!r}, which is not installed; "
            "`pip install '.[demo]'` brings everything it needs"
        )
    return Path(spec.origin).parent


def _sources(package: str) -> list[Path]:
    root = _package(package)
    return [p for p in root.rglob("*.py") if "tests" not in p.parts]


def _read(root: Path, paths: list[Path]) -> Iterator[Document]:
    for path in sorted(paths, key=lambda p: _order(p.relative_to(root).as_posix())):
        if path.is_file() and path.stat().st_size < 400_000:
            yield Document(path.relative_to(root).as_posix(), path.read_text("utf-8", errors="ignore"))


def _interleave(readers: list[Iterator[Document]]) -> Iterator[Document]:
    while readers:
        for reader in list(readers):
            document = next(reader, None)
            if document is None:
                readers.remove(reader)
            else:
                yield document


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _fresh_text(document: Document, seen: set[bytes]) -> bytes:
    """The document without paragraphs seen before, in ASCII (anything else becomes '?')."""
    kept = []
    for paragraph in document.text.replace("\r\n", "\n").split("\n\n"):
        key = re.sub(r"[\W_]+", "", paragraph.lower())
        if len(key) >= _SHORT_PARAGRAPH:
            digest = hashlib.sha256(key.encode()).digest()[:16]
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept).strip().encode("ascii", errors="replace")


def _fill(documents: Iterator[Document], seen: set[bytes], size: int) -> tuple[bytes, int]:
    """Documents joined until ``size`` bytes are reached (or they end), and how many files that took."""
    parts: list[bytes] = []
    total = 0
    for document in documents:
        text = _fresh_text(document, seen)
        if len(text) >= CONTEXT:
            parts.append(text)
            total += len(text) + 3
        if total >= size:
            break
    return b"\n\n\n".join(parts)[:size], len(parts)


def _heldout_windows(
    name: str, documents: Iterator[Document], seen: set[bytes], count: int
) -> tuple[Tensor, int]:
    """[count, CONTEXT] uint8: windows within one file each, a sixteenth of them from one file at most."""
    windows: list[bytes] = []
    files = 0
    for document in documents:
        text = _fresh_text(document, seen)
        cuts = [text[start : start + CONTEXT] for start in range(0, len(text) - CONTEXT + 1, CONTEXT)]
        if cuts:
            step = -(-len(cuts) // max(1, count // 16))
            windows += islice(cuts, 0, None, step)
            files += 1
        if len(windows) >= count:
            return torch.stack([_tensor(window) for window in windows[:count]]), files
    raise RuntimeError(
        f"domain {name!r} has only {len(windows)} held-out windows on this machine; {count} are needed"
    )


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
