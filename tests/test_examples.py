"""The examples run as a user runs them, and the short demo shows what the long one is for."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))


def run(*command: str, cwd: Path) -> str:
    """Runs an example in ``cwd`` with this checkout's package; its output."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def needs_demo_packages() -> None:
    for package in ("transformers", "matplotlib", "rich", "safetensors"):
        pytest.importorskip(package, reason="the demo's packages are an extra: pip install '.[demo]'")


def test_moa_linear(tmp_path):
    printed = run(str(EXAMPLES / "moa_linear.py"), cwd=tmp_path)
    assert "['lora_A', 'lora_B', 'router.weight']" in printed


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Numbers and output of the short demo, run once."""
    needs_demo_packages()
    folder = tmp_path_factory.mktemp("demo")
    printed = run(str(EXAMPLES / "demo.py"), "--fast", cwd=folder)
    return json.loads((folder / "demo_out" / "demo.json").read_text()), printed, folder / "demo_out"


def test_demo_learns_and_routes(demo):
    numbers, _, _ = demo
    bits = numbers["bits_per_byte"]
    for domain, base in bits["base"].items():
        assert bits["oracle"][domain] < base, domain
    mean = {method: sum(row.values()) / len(row) for method, row in bits.items()}
    assert mean["base"] < mean["unigram"]
    assert mean["moa"] < mean["base"]
    chance = 1 / len(bits["base"])
    assert min(numbers["router_accuracy_per_block"]) > 1.5 * chance


def test_demo_composition(demo):
    properties = demo[0]["properties"]
    assert properties["base_tensors_copied"] == 0
    assert properties["deleted"]["others_by_id_identical"]
    assert properties["deleted"]["base_by_id_equals_plain"]
    assert properties["updated"]["changed"]
    assert properties["updated"]["others_by_id_identical"]


def test_demo_writes_plot_numbers_and_adapters(demo):
    numbers, printed, folder = demo
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    for domain in numbers["bits_per_byte"]["base"]:
        assert (folder / "adapters" / domain / "adapter_model.safetensors").exists()
        assert numbers["samples"][domain]["text"]
    assert numbers["environment"]["cpu_isa"] in printed


def test_compose_routes_the_demos_adapters(demo, tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    folder, command = demo[2], [str(EXAMPLES / "compose.py"), str(demo[2] / "base"), "--steps", "30"]
    for name, text in (("python", EXAMPLES / "demo.py"), ("licences", ROOT / "LICENSE")):
        command += ["--adapter", name, str(folder / "adapters" / name), str(text)]
    printed = run(*command, cwd=tmp_path)
    assert "read again: ['python', 'licences']" in printed
    assert printed.count("by domain [[1.0, 0.0], [0.0, 1.0]]") >= 1
    assert (tmp_path / "composed" / "python" / "adapter_model.safetensors").exists()
    assert (tmp_path / "composed" / "routing.png").exists()


def test_corpus_splits_are_disjoint():
    """No paragraph occurs in two splits."""
    needs_demo_packages()
    from corpus import load_corpus

    def paragraphs(text: bytes) -> set[str]:
        keys = (re.sub(r"[\W_]+", "", part.lower()) for part in text.decode().split("\n\n"))
        return {key for key in keys if len(key) >= 24}

    corpus = load_corpus(pretrain_bytes=200_000, adapt_bytes=60_000, heldout_windows=8)
    streams = {"pretraining": corpus.pretrain, **{name: d.adapt for name, d in corpus.domains.items()}}
    splits = {name: paragraphs(bytes(stream.numpy())) for name, stream in streams.items()}
    for name, domain in corpus.domains.items():
        windows = (bytes(window.numpy()) for window in domain.heldout)
        whole = (
            window.partition(b"\n\n")[2].rpartition(b"\n\n")[0] for window in windows
        )  # the ends are cut
        splits[f"held-out {name}"] = set().union(*map(paragraphs, whole))
    for first, second in itertools.combinations(splits, 2):
        assert not splits[first] & splits[second], (first, second)
