"""``make gpu-check``: all that only a GPU can show, in one command without network, and a dated record.

    python -m benchmarks.gpu_check                 tests, compute-sanitizer, benchmarks; a few minutes
    python -m benchmarks.gpu_check --only tests    a part of it

Tests and sanitizer run at once, most of their time being Python and references on the CPU; benchmarks after
them, alone. Each step has what is left of the time; one that fails does not stop the others, and the exit
status says whether any did. What they are expected to take is what they took, started by hand, beside an H200
on 16 cores. The record, JSON and Markdown, goes to
benchmarks/results/<device>/<date>, ready to be committed; ``--out`` names another folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_record
from benchmarks.machine import ROOT
from benchmarks.record import Case

BUILD = 60.0  # seconds: 140 of one core for one architecture, on the eight or more that such a machine has
LIMIT = 480.0 - BUILD
KERNELS = ("routing", "shrink", "router", "decode", "routed", "expand", "gram", "mixture")
KERNEL_TESTS = [f"tests/emulator/test_{name}.py" for name in KERNELS]
DEVICE_TESTS = ["tests/test_segment_lora.py", "tests/test_routing.py", "tests/test_linear.py"]
TAIL = 2000  # characters kept of what a step said


@dataclass(frozen=True)
class Step:
    """A command. ``most``: seconds it may take; ``needs``: a program without which it is left out; ``alone``:
    nothing else runs meanwhile.
    """

    name: str
    group: str  # what --only names
    command: list[str]
    most: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    expected: float = 0.0  # seconds
    alone: bool = False


def steps(python: str, results: Path, device: str, budget: float) -> list[Step]:
    """What is run: all at once, then in this order what runs alone."""
    quiet = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20", *abreast()]
    small = [python, "tests/gpu/small.py", "--device", device]
    bench = [
        python,
        "-m",
        "benchmarks.gpu",
        "--device",
        device,
        "--json",
        str(results),
        "--budget",
        str(budget),
    ]
    sanitizer = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    emulated = {"MOA_EMULATOR": f"{device}:0"}
    there = {"MOA_TEST_DEVICE": device}
    tool = "compute-sanitizer"
    return [
        Step("what is built", "tests", [python, "-m", "moa_ops.info"], 60, expected=10),
        Step("on the card", "tests", [*quiet, "tests/gpu"], 150, expected=50),
        Step("the emulator's tests", "tests", [*quiet, *KERNEL_TESTS], 150, emulated, expected=50),
        Step("the CPU's tests", "tests", [*quiet, *DEVICE_TESTS], 150, there, expected=50),
        *(
            Step(
                check,
                "sanitizer",
                [tool, "--tool", check, "--error-exitcode", "9", *small, *more],
                150,
                sanitizer,
                tool,
                expected=50,
            )
            for check, more in (("memcheck", ()), ("racecheck", ()), ("initcheck", ("--alone",)))
        ),
        # ten cases, their making, and, by estimate, a second for a look at their kernels
        Step("benchmarks", "bench", bench, 180, expected=10 * (budget + 4), alone=True),
    ]


def abreast() -> list[str]:
    """What has pytest run on a quarter of the cores: there are three of it, and the sanitizer."""
    workers = min(8, (os.cpu_count() or 1) // 4)
    return ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []


def run_step(step: Step, left: float) -> dict[str, Any]:
    """Runs one; the outcome is ``ok``, ``failed (status)``, ``out of time`` or ``left out: why``."""
    if step.needs is not None and shutil.which(step.needs, path=tool_path()) is None:
        return {"name": step.name, "outcome": f"left out: no {step.needs}", "seconds": 0.0, "tail": ""}
    if left < 5:
        return {"name": step.name, "outcome": "left out: no time left", "seconds": 0.0, "tail": ""}
    environment = {**os.environ, **step.environment, "PATH": tool_path()}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=min(step.most, left),
        )
        outcome = "ok" if done.returncode == 0 else f"failed ({done.returncode})"
        said = done.stdout
    except subprocess.TimeoutExpired as expired:
        outcome, said = "out of time", (expired.stdout or b"").decode(errors="replace")
    seconds, tail = time.perf_counter() - started, without_places(said)[-TAIL:]
    print(f"{tail}\n== {step.name}: {outcome}, {seconds:.0f} s ==", flush=True)
    return {"name": step.name, "outcome": outcome, "seconds": seconds, "tail": tail}


def without_places(text: str) -> str:
    """Files by their path in Python's environment, else in the repository: a record is public."""
    for folder in (sys.prefix, str(ROOT)):
        text = text.replace(f"{folder}/", "")
    return text


def tool_path() -> str:
    """PATH, with the toolkit's programs behind it."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.pathsep.join([os.environ.get("PATH", os.defpath), f"{cuda}/bin", f"{cuda}/compute-sanitizer"])


def read_results(path: Path) -> tuple[dict[str, Any], list[Case]]:
    """What ``benchmarks.gpu`` measured; nothing if it did not get that far."""
    if not path.exists():
        return {}, []
    document = json.loads(path.read_text())
    return document["facts"], [Case(**case) for case in document["cases"]]


def main(words: list[str] | None = None) -> None:
    """Runs the steps and writes the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="tests,sanitizer,bench", help="groups of steps (%(default)s)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s; cpu only tries the code")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing per case (%(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the record")
    args = parser.parse_args(words)
    groups = set(args.only.split(","))
    if groups - {"tests", "sanitizer", "bench"}:
        parser.error(f"--only takes tests, sanitizer, bench; got {args.only}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu-check: torch sees no CUDA device here (python -m moa_ops.info says more)")

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "bench.json"
        plan = [s for s in steps(sys.executable, results, args.device, args.budget) if s.group in groups]

        def run(step: Step) -> dict[str, Any]:
            return run_step(step, args.limit - (time.perf_counter() - started))

        with ThreadPoolExecutor(len(plan)) as pool:
            outcomes = list(pool.map(run, (step for step in plan if not step.alone)))
        outcomes += [run(step) for step in plan if step.alone]
        facts, cases = read_results(results)
    document = gpu_record.document(device, outcomes, facts)
    out = args.out or ROOT / "benchmarks" / "results" / gpu_record.folder_name(document["machine"]["name"])
    for path in gpu_record.write(out, document, cases):
        print(f"wrote {path}")
    print(gpu_record.text(document, cases))
    bad = [
        s["name"] for s in outcomes if s["outcome"] != "ok" and not s["outcome"].startswith("left out: no c")
    ]
    raise SystemExit(f"gpu-check: {', '.join(bad)} did not pass" if bad else 0)


if __name__ == "__main__":
    main()
