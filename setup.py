"""Translates environment variables into a cmake call; says version and wheel tag. The build: CMakeLists.txt.

MOA_CUDA              auto (default), 0 or 1: see CMakeLists.txt
TORCH_CUDA_ARCH_LIST  "8.0;9.0;12.0+PTX": CUDA architectures, default every one we ship
MAX_JOBS              parallel compilations, default from cores and free memory
MOA_LOCAL_VERSION     "cu130": local version label, 0.1.0+cu130
CMAKE_ARGS            further arguments for cmake, as a shell would split them
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
GIB = 1 << 30
MEMORY_PER_JOB = 2 * GIB  # one nvcc over all architectures; a C++ file needs a quarter of it

NO_TORCH = (
    "moa_ops: torch was not found, and building needs its headers: type `pip install 'torch>=2.10'`, "
    "then `pip install --no-build-isolation .`"
)


def cuda_architectures(arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a 12.0+PTX") in CMake's words ("80-real;90a-real;120")."""
    archs = []
    for item in re.split(r"[;,\s]+", arch_list.strip(" ;,")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(
                f"moa_ops: TORCH_CUDA_ARCH_LIST={arch_list!r}: {item!r} is no architecture; "
                'write for example "8.0;9.0;12.0+PTX".'
            )
        major, minor, variant, ptx = match.groups()
        archs.append(f"{major}{minor}{variant}" + ("" if ptx else "-real"))
    return ";".join(dict.fromkeys(archs))


def free_memory() -> int:
    """Bytes this process may still use: the machine's, or its container's limit if that is lower."""
    available = 4 * GIB
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        available = int(match.group(1)) * 1024 if match else available
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.exists() and limit.read_text().strip().isdigit():
            available = min(available, int(limit.read_text()))
    return available


def max_jobs(env: Mapping[str, str], cores: int, memory: int) -> int:
    """MAX_JOBS if set; otherwise one per core, as far as `memory` (bytes) allows."""
    text = env.get("MAX_JOBS", "").strip()
    if not text:
        return max(1, min(cores, memory // MEMORY_PER_JOB))
    if not text.isdigit() or int(text) == 0:
        raise SystemExit(f"moa_ops: MAX_JOBS={text!r}: give a whole number from 1 up.")
    return int(text)


def version(env: Mapping[str, str]) -> str:
    """The version in moa_ops/version.py, with MOA_LOCAL_VERSION behind it ("0.1.0+cu130")."""
    match = re.search(r'__version__ = "(.+)"', (ROOT / "moa_ops" / "version.py").read_text())
    if match is None:
        raise SystemExit('moa_ops: moa_ops/version.py holds no line `__version__ = "..."`.')
    local = env.get("MOA_LOCAL_VERSION", "").strip()
    if local and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", local):
        raise SystemExit(f"moa_ops: MOA_LOCAL_VERSION={local!r}: lower-case letters, digits and dots only.")
    return match.group(1) + (f"+{local}" if local else "")


def find_torch() -> Path | None:
    """The directory of the installed torch package, without importing it.

    Under pip's build isolation sys.path is cut, but the interpreter is still the environment's own, so its
    site-packages are looked into as well; and those of an activated environment. The stable ABI makes any
    torch>=2.10 good for building.
    """
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if active := os.environ.get("VIRTUAL_ENV"):
        places.append(sysconfig.get_path("purelib", vars={"base": active, "platbase": active}))
    places += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    spec = importlib.machinery.PathFinder.find_spec("torch", places)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def find_tool(name: str) -> str | None:
    """A program beside this interpreter or on PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def cmake_arguments(env: Mapping[str, str], torch_dir: Path, output: Path, ninja: str | None) -> list[str]:
    """What cmake is told; the -U drop what an earlier configuration left in its cache."""
    cuda = env.get("MOA_CUDA", "").strip().lower() or "auto"
    if cuda not in ("auto", "0", "1"):
        raise SystemExit(f"moa_ops: MOA_CUDA={cuda!r}: allowed are auto, 0 and 1.")
    arguments = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DMOA_TORCH_DIR={torch_dir}",
        f"-DMOA_OUTPUT_DIR={output}",
        f"-DMOA_CUDA={cuda}",
        "-UMOA_NVCC",
        "-UCMAKE_CUDA_ARCHITECTURES",
    ]
    if env.get("TORCH_CUDA_ARCH_LIST", "").strip():
        arguments[-1] = f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures(env['TORCH_CUDA_ARCH_LIST'])}"
    if ninja:
        arguments += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return arguments + shlex.split(env.get("CMAKE_ARGS", ""))


class CMakeBuild(build_ext):
    """build_ext whose one extension comes from cmake, in build/cmake, which later builds take up again."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds; cmake writes the module to where setuptools expects `ext`."""
        cmake, ninja, torch_dir = find_tool("cmake"), find_tool("ninja"), find_torch()
        if cmake is None:
            raise SystemExit("moa_ops: cmake was not found: type `pip install cmake ninja`.")
        if torch_dir is None:
            raise SystemExit(NO_TORCH)
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / "cmake"
        forget_foreign_cache(build, "Ninja" if ninja else "Unix Makefiles")
        jobs = max_jobs(os.environ, len(os.sched_getaffinity(0)), free_memory())
        arguments = cmake_arguments(os.environ, torch_dir, output, ninja)
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), *arguments],
            [cmake, "--build", str(build), "--parallel", str(jobs)],
        ):
            if subprocess.run(command).returncode:
                raise SystemExit("moa_ops: the build failed; the messages above say why.")


def forget_foreign_cache(build: Path, generator: str) -> None:
    """Removes a build folder that cmake would refuse: another generator's, or one moved from elsewhere."""
    cache = build / "CMakeCache.txt"
    if cache.exists():
        wanted = (f"CMAKE_GENERATOR:INTERNAL={generator}\n", f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n")
        if not all(line in cache.read_text() for line in wanted):
            shutil.rmtree(build)


def missing_requirements() -> list[str]:
    """What an isolated build environment has to bring, because it was not found anywhere on the machine."""
    tools = {"cmake": "cmake>=3.22", "ninja": "ninja"}
    missing = [requirement for tool, requirement in tools.items() if find_tool(tool) is None]
    return missing if find_torch() else [*missing, "torch>=2.10"]


if __name__ == "__main__":
    # Front ends first ask, by egg_info, what an isolated environment has to bring. In every other step torch
    # must be there; saying so at once spares the download of everything else.
    asking = "egg_info" in sys.argv
    if not asking and "sdist" not in sys.argv and find_torch() is None:
        raise SystemExit(NO_TORCH)
    setup(
        version=version(os.environ),
        ext_modules=[Extension("moa_ops._C", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": CMakeBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
        setup_requires=missing_requirements() if asking else [],
    )
