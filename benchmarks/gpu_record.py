"""The record of a GPU check: device, driver, versions, commit, every step's outcome, and the figures."""

from __future__ import annotations

import datetime
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, record
from benchmarks.record import NOT_OPPONENTS, OURS, Case

GIVEN = "decode, experts given"  # a case's section


def driver() -> str | None:
    """The driver's version, as nvidia-smi says it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """Name and size of the device, or that there is none."""
    if device.type != "cuda":
        return {"name": "no GPU", "driver": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gbytes": round(properties.total_memory / 2**30, 1),
        "driver": driver(),
    }


def document(device: torch.device, steps: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything but the cases."""
    return {
        "date": datetime.date.today().isoformat(),
        **machine.commit(),
        "machine": describe(device),
        "versions": {**machine.versions(), "torch_cuda": torch.version.cuda},
        "steps": steps,
        "facts": facts,
    }


def folder_name(name: str) -> str:
    """``NVIDIA H200`` as ``nvidia-h200``."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs"


def row(case: Case) -> list[str]:
    """Label, time, ratio, floor, aim, and the best alternative."""
    ours = case.timed().get(OURS)
    if ours is None:
        return [case.section, case.label, case.dtype, "-", "-", "-", "-", "-"]
    facts = case.facts
    floor, aim = facts.get("floor"), facts.get("aim")
    best = case.best_alternative() if case.section not in ("routing", "mixture") else None
    aims = f"{aim:.2f}" if aim else "-"
    if facts.get("aim_seconds"):
        aims = micro(facts["aim_seconds"])
    if "share_of_copy" in facts:
        aims = f"{facts['share_of_copy']:.0%} of copy, aim {facts['aim_share']:.0%}"
    return [
        case.section,
        case.label,
        case.dtype,
        micro(ours["seconds"]["median"]),
        f"{ours['ratio']['median']:.3f} × {case.baseline}",
        f"{floor:.3f}" if floor else "-",
        aims,
        f"{best[1]:.3f} ({best[0]})" if best else "-",
    ]


def kernel(found: dict[str, Any]) -> str:
    """Name and time of a kernel, and its launches if there are several."""
    times = f" in {found['launches']:g} launches" if found["launches"] != 1 else ""
    return f"{found['name']} {micro(found['seconds'])}{times}"


HEAD = ["what", "shape", "dtype", "time", "ratio", "floor", "aim", "best in plain PyTorch"]


def table(cases: list[Case]) -> str:
    """Markdown: a row a case, then every variant's ratio."""
    rows = [HEAD, ["---"] * len(HEAD), *map(row, cases)]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.append("")
    for case in cases:
        others = [
            f"{name} {values['ratio']['median']:.3f}" if "ratio" in values else f"{name}: {values['absent']}"
            for name, values in case.variants.items()
            if name not in NOT_OPPONENTS and ("ratio" in values or "absent" in values)
        ]
        if others and case.section not in ("routing", "mixture"):
            lines.append(f"- {case.section}, {case.label}: {'; '.join(others)}")
    for case in cases:
        if found := case.facts.get("kernels"):
            lines.append(f"- kernels of {case.section}, {case.label}: {'; '.join(map(kernel, found))}")
    return "\n".join(lines)


def text(document: dict[str, Any], cases: list[Case]) -> str:
    """The readable half of the record."""
    device, versions = document["machine"], document["versions"]
    modified = " (modified)" if document["modified"] else ""
    head = [
        f"# {device['name']}, {document['date']}",
        "",
        f"Driver {device['driver']}; torch {versions['torch']}, CUDA {versions['torch_cuda']}; moa_ops "
        f"{versions['moa_ops']}, commit {document['commit']}{modified}; Python {versions['python']}.",
        "",
        "| step | outcome | seconds |",
        "| --- | --- | ---: |",
        *(f"| {s['name']} | {s['outcome']} | {s['seconds']:.0f} |" for s in document["steps"]),
        "",
    ]
    return "\n".join(head) + ("\n" + table(cases) + "\n" if cases else "")


def write(folder: Path, document: dict[str, Any], cases: list[Case]) -> list[Path]:
    """``<date>.json`` and ``<date>.md``."""
    path = folder / f"{document['date']}.json"
    record.save(path, document, cases)
    path.with_suffix(".md").write_text(text(document, cases))
    return [path, path.with_suffix(".md")]
