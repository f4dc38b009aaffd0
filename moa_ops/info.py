"""``python -m moa_ops.info``: versions, which kernels are built, which run here, and why not the others."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

import torch

from moa_ops import _lib
from moa_ops.ops import KERNELS
from moa_ops.version import __version__


def collect() -> dict[str, Any]:
    """What is installed, built and in use, as plain values that ``json.dumps`` takes."""
    operators = torch.ops.moa_ops
    build = json.loads(operators.build_info())
    compiled = build["isas"].split(",")
    available = operators.cpu_isas().split(",")
    return {
        "moa_ops": distribution_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "library": _lib._C.__file__,
        "built_with": {key: build[key] for key in ("compiler", "build_type", "torch")},
        "cpu": {
            "compiled": compiled,
            "available": [isa for isa in compiled if isa in available],
            "in_use": operators.cpu_isa(),
            "MOA_CPU_ISA": os.environ.get("MOA_CPU_ISA"),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "cuda": {
            "built": bool(build["cuda"]),
            "toolkit": build["cuda"] or None,
            "architectures": build["cuda_archs"].split(",") if build["cuda_archs"] else [],
            "why_not_built": build["cuda_note"] or None,
            "torch_cuda": torch.version.cuda,
            "devices": devices(),
            "in_plain_pytorch": without_kernel("CUDA"),
        },
    }


def distribution_version() -> str:
    """The installed version with its local label ("0.1.0+cu130"); without an installation the source's."""
    try:
        return installed_version("moa-ops")
    except PackageNotFoundError:
        return __version__


def without_kernel(key: str) -> list[str]:
    """Operators that have no compiled kernel under a dispatch key, so that plain PyTorch does their work."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in KERNELS if not has(f"moa_ops::{name}", key)]


def devices() -> list[str]:
    """The CUDA devices torch sees, "NVIDIA H100 (sm_90)"."""
    if not torch.cuda.is_available():
        return []
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return names


def cuda_summary(cuda: dict[str, Any]) -> str:
    """One line: whether CUDA kernels will run here, and if not, why."""
    if not cuda["built"]:
        return f"not built: {cuda['why_not_built']}"
    built = f"built by CUDA {cuda['toolkit']} for {', '.join(cuda['architectures'])}"
    if cuda["in_plain_pytorch"]:
        built += f"; still in plain PyTorch: {', '.join(cuda['in_plain_pytorch'])}"
    if not cuda["torch_cuda"]:
        return f"{built}; not used: this torch is a CPU build"
    if not cuda["devices"]:
        return f"{built}; not used: torch sees no CUDA device"
    return f"{built}; devices: {', '.join(cuda['devices'])}"


def describe(info: dict[str, Any]) -> str:
    """`collect()`'s answer for people to read."""
    cpu, build = info["cpu"], info["built_with"]
    absent = [isa for isa in cpu["compiled"] if isa not in cpu["available"]]
    chosen = f"forced by MOA_CPU_ISA={cpu['MOA_CPU_ISA']}" if cpu["MOA_CPU_ISA"] else "the best available"
    rows = [
        ("moa_ops", info["moa_ops"]),
        ("torch", info["torch"]),
        ("python", f"{info['python']}, {info['machine']}"),
        ("library", info["library"]),
        ("built with", f"{build['compiler']}, {build['build_type']}, headers of torch {build['torch']}"),
        ("CPU kernels", ", ".join(cpu["compiled"])),
        ("  in use", f"{cpu['in_use']} ({chosen})"),
        ("  not here", f"{', '.join(absent)}: this machine lacks the instructions" if absent else "-"),
        ("  threads", f"{cpu['threads']} (torch.set_num_threads), {cpu['cores']} cores usable"),
        ("CUDA kernels", cuda_summary(info["cuda"])),
    ]
    return "\n".join(f"{name:<13} {text}" for name, text in rows)


def main() -> None:
    """Prints the description, or with --json the values."""
    parser = argparse.ArgumentParser(prog="python -m moa_ops.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    arguments = parser.parse_args()
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else describe(info))


if __name__ == "__main__":
    main()
