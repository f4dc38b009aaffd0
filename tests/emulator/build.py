"""Compiles every ``csrc/**/*.cu`` and every ``bind_*.cpp`` with g++ into one Python module per variant.

python tests/emulator/build.py [plain asan tsan]     builds, incrementally; the tests do it by themselves
"""

from __future__ import annotations

import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUTPUT = ROOT / "build" / "emulator"

COMMON = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-DMOA_EMULATE"),
    *(
        "-fno-strict-aliasing",
        "-fno-optimize-sibling-calls",
        "-fno-thread-jumps",  # no second copy of a barrier, which would be another place
        "-ffp-contract=off",
        "-ftrivial-auto-var-init=pattern",
    ),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
]
VARIANTS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    # GCC instruments every access; races.cpp, and not libtsan, is what it reports to.
    "tsan": ["-DMOA_EMULATE_TSAN"],
}
ONLY_TSAN = {"races", "trace"}
INSTRUMENT = {"tsan": ["-fsanitize=thread"]}  # kernels only, not the emulator

# For programs that threads start: pytest sets and unsets a variable around each test, and one that starts
# while the process's own list of variables moves fails with "bad address".
ENVIRONMENT = dict(os.environ)


class BuildError(RuntimeError):
    """The compiler's output."""


def why_not() -> str | None:
    """Why the emulator cannot be built on this machine, or None."""
    if os.uname().machine != "x86_64" or sys.platform != "linux":
        return "the CUDA emulator runs on x86-64 Linux only"
    if compiler() is None:
        return "the CUDA emulator needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA emulator needs pybind11 (pip install '.[test]')"
    return None


def compiler() -> str | None:
    """The C++ compiler: the emulator knows GCC."""
    return shutil.which("g++")


def kernel_sources() -> list[Path]:
    """Every kernel, the emulator's demonstration among them."""
    return [*sorted((ROOT / "csrc").rglob("*.cu")), *sorted(HERE.glob("*.cu"))]


def sources(variant: str) -> list[Path]:
    """Everything that goes into a module."""
    machine = [path for path in sorted(HERE.glob("*.cpp")) if variant == "tsan" or path.stem not in ONLY_TSAN]
    return [*kernel_sources(), *machine]


def flags(variant: str, source: Path) -> list[str]:
    """Compiler flags of one source."""
    result = [*COMMON, *VARIANTS[variant], f"-I{ROOT / 'csrc'}", f"-I{HERE.parent}"]
    if source.suffix == ".cu":
        return [*result, *INSTRUMENT.get(variant, []), "-x", "c++"]
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    optimise = [] if source.name.startswith("bind_") else ["-O2"]  # the machine itself
    return [*result, *optimise, *(f"-isystem{path}" for path in includes), f"-DMOA_MODULE=emulated_{variant}"]


def run(command: list[str]) -> None:
    """Runs the compiler; what it says is an error's text."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )
    if result.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{result.stdout}")
    if result.stdout:
        print(result.stdout, file=sys.stderr)


def compile_source(
    variant: str, source: Path, target: Path, first: Sequence[str] = (), last: Sequence[str] = ()
) -> bool:
    """Compiles ``source`` if it, a header or a flag changed; ``first`` and ``last`` go around its flags."""
    ccache = shutil.which("ccache")
    command = [*([ccache] if ccache else []), compiler(), *first, *flags(variant, source), *last]
    command += ["-MMD", "-c", str(source), "-o", str(target)]
    said, depends = target.with_suffix(".cmd"), target.with_suffix(".d")
    if target.exists() and said.exists() and said.read_text() == shlex.join(command):
        needed = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        built = target.stat().st_mtime
        if all(Path(name).exists() and Path(name).stat().st_mtime <= built for name in needed):
            return False
    target.parent.mkdir(parents=True, exist_ok=True)
    run(command)
    said.write_text(shlex.join(command))
    return True


def object_of(variant: str, source: Path) -> Path:
    """Where the object file of a source goes."""
    name = str(source.relative_to(ROOT)).replace("/", "-")
    return OUTPUT / variant / f"{name}.o"


def link(variant: str, objects: list[Path], target: Path) -> None:
    """Links a module."""
    sanitize = [flag for flag in VARIANTS[variant] if flag.startswith("-fsanitize")]
    run([compiler(), "-shared", *sanitize, *map(str, objects), "-o", str(target), "-ldl"])


def jobs() -> int:
    """Parallel compilations."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


@functools.cache
def build(variant: str) -> Path:
    """The module of a variant, compiled as far as something changed; by one process at a time."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_alone(variant)


def build_alone(variant: str) -> Path:
    """What ``build`` does while no other process does."""
    objects = {source: object_of(variant, source) for source in sources(variant)}
    with ThreadPoolExecutor(jobs()) as pool:
        changed = list(pool.map(lambda item: compile_source(variant, *item), objects.items()))
    module = OUTPUT / variant / f"emulated_{variant}.so"
    listed = module.with_suffix(".list")
    content = "\n".join(map(str, objects.values()))
    if any(changed) or not module.exists() or not listed.exists() or listed.read_text() != content:
        link(variant, list(objects.values()), module)
        listed.write_text(content)
    return module


def load_file(module: Path) -> ModuleType:
    """Imports a built module."""
    name = module.name.split(".")[0]
    spec = importlib.util.spec_from_loader(name, importlib.machinery.ExtensionFileLoader(name, str(module)))
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


@functools.cache
def load(variant: str) -> ModuleType:
    """Builds and imports a variant. ``asan`` needs ``asan_environment``. MOA_EMULATOR_MODULE: that one."""
    other = os.environ.get("MOA_EMULATOR_MODULE")
    return load_file(Path(other) if other else build(variant))


def asan_environment(module: Path) -> dict[str, str]:
    """Environment variables for a Python that imports the variant ``asan``: its libraries come first."""
    command = ["ldd", str(module)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout
    found = [line.split()[2] for line in said.splitlines() if "libasan" in line or "libubsan" in line]
    return {
        "LD_PRELOAD": ":".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS:
        print(build(name))
