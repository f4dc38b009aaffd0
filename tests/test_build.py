"""The binary is what a wheel needs, `moa_ops.info` tells the truth, and setup.py translates its variables."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moa_ops import _lib, info

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(_lib._C.__file__)
ISAS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"]


def output_of(*command: str | Path, expect: int | None = 0, **env: str) -> str:
    """Stdout and stderr of a command, whose exit status must be `expect` (None: any but 0)."""
    run = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **env},
    )
    assert run.returncode == expect if expect is not None else run.returncode != 0, run.stdout
    return run.stdout


# ---- the binary ----


def test_one_binary_for_all_pythons() -> None:
    assert LIBRARY.name == "_C.abi3.so"


def test_exports_its_init_function_only() -> None:
    rows = [line.split() for line in output_of("readelf", "--wide", "--dyn-syms", LIBRARY).splitlines()]
    defined = [
        row[7] for row in rows if len(row) >= 8 and row[4] in ("GLOBAL", "WEAK", "UNIQUE") and row[6] != "UND"
    ]
    assert defined == ["PyInit__C"]


def test_links_torch_but_neither_python_nor_cuda_nor_a_place() -> None:
    dynamic = output_of("readelf", "--wide", "-d", LIBRARY)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if name.startswith(("libpython", "libcud", "libtorch_python"))]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_holds_no_path_of_the_build_machine() -> None:
    binary = LIBRARY.read_bytes()
    for place in (ROOT, Path(torch.__file__).parent, Path(sys.prefix)):
        assert str(place).encode() + b"/" not in binary


# ---- python -m moa_ops.info ----


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads(output_of(sys.executable, "-m", "moa_ops.info", "--json", MOA_CPU_ISA="scalar"))


def test_info_values(facts: dict) -> None:
    assert facts["torch"] == torch.__version__
    assert Path(facts["library"]) == LIBRARY
    assert facts["cpu"]["compiled"] == [isa for isa in ISAS if isa in facts["cpu"]["compiled"]]
    assert facts["cpu"]["available"][0] == "scalar"
    assert facts["cpu"]["MOA_CPU_ISA"] == "scalar"
    assert facts["cpu"]["in_use"] == "scalar"
    assert facts["cuda"]["built"] == (facts["cuda"]["why_not_built"] is None)


def test_info_text(facts: dict) -> None:
    text = info.describe(facts)
    assert "scalar (forced by MOA_CPU_ISA=scalar)" in text
    assert all(len(line) < 300 for line in text.splitlines())
    ours = info.collect()
    assert f"{ours['cpu']['in_use']} (" in info.describe(ours)


CUDA = {
    "built": True,
    "toolkit": "13.0",
    "architectures": ["90-real"],
    "why_not_built": None,
    "in_plain_pytorch": [],
}


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        ({"built": False, "why_not_built": "nvcc was not found"}, "not built: nvcc was not found"),
        ({**CUDA, "torch_cuda": None, "devices": []}, "torch is a CPU build"),
        (
            {**CUDA, "torch_cuda": "13.0", "devices": [], "in_plain_pytorch": ["segment_lora"]},
            "still in plain PyTorch: segment_lora",
        ),
        ({**CUDA, "torch_cuda": "13.0", "devices": []}, "torch sees no CUDA device"),
        ({**CUDA, "torch_cuda": "13.0", "devices": ["NVIDIA H100 (sm_90)"]}, "devices: NVIDIA H100 (sm_90)"),
    ],
)
def test_info_says_why_cuda_is_not_used(cuda: dict, expected: str) -> None:
    assert expected in info.cuda_summary(cuda)


def test_a_library_that_does_not_load_is_explained(tmp_path: Path) -> None:
    absent = tmp_path / "_C.abi3.so"
    assert "is not built" in _lib.explain(ImportError(), absent)
    absent.touch()
    text = _lib.explain(ImportError("undefined symbol: f"), absent)
    assert "undefined symbol: f" in text
    assert "pip install" in text


# ---- setup.py ----


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moa_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arch_list", "cmake"),
    [
        ("9.0", "90-real"),
        ("8.0;9.0;10.0;12.0+PTX", "80-real;90-real;100-real;120"),
        ("8.0 8.6, 9.0a;12.0f+PTX;", "80-real;86-real;90a-real;120f"),
        ("9.0;9.0", "90-real"),
    ],
)
def test_architectures_in_cmake_words(setup_py: ModuleType, arch_list: str, cmake: str) -> None:
    assert setup_py.cuda_architectures(arch_list) == cmake


@pytest.mark.parametrize("arch_list", ["90", "sm_90", "9.0+ptx", "8.0;;x"])
def test_architectures_that_are_none(setup_py: ModuleType, arch_list: str) -> None:
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST=.*is no architecture; write for example"):
        setup_py.cuda_architectures(arch_list)


def test_jobs_follow_cores_and_memory(setup_py: ModuleType) -> None:
    gib = 1 << 30
    assert setup_py.max_jobs({}, cores=8, memory=64 * gib) == 8
    assert setup_py.max_jobs({}, cores=64, memory=16 * gib) == 8
    assert setup_py.max_jobs({}, cores=2, memory=gib) == 1
    assert setup_py.max_jobs({"MAX_JOBS": "3"}, cores=8, memory=gib) == 3
    with pytest.raises(SystemExit, match="MAX_JOBS='many'"):
        setup_py.max_jobs({"MAX_JOBS": "many"}, cores=8, memory=gib)
    assert setup_py.free_memory() > 0


def test_version_label(setup_py: ModuleType) -> None:
    plain = setup_py.version({})
    assert setup_py.version({"MOA_LOCAL_VERSION": "cu130"}) == f"{plain}+cu130"
    with pytest.raises(SystemExit, match="MOA_LOCAL_VERSION='cu 130'"):
        setup_py.version({"MOA_LOCAL_VERSION": "cu 130"})


def test_torch_is_found_with_a_bare_path(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Path(torch.__file__).parent
    assert setup_py.find_torch() == installed
    monkeypatch.setattr(sys, "path", [sysconfig.get_path("stdlib")])  # as under pip's build isolation
    assert setup_py.find_torch() is not None


def test_environment_becomes_cmake_arguments(setup_py: ModuleType) -> None:
    def translate(**env: str) -> list[str]:
        return setup_py.cmake_arguments(env, Path("torch"), Path("out"), ninja="ninja")

    assert "-DMOA_CUDA=auto" in translate()
    assert "-UCMAKE_CUDA_ARCHITECTURES" in translate()
    told = translate(
        MOA_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX", CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug '-DX=a b'"
    )
    assert {"-DMOA_CUDA=1", "-DCMAKE_CUDA_ARCHITECTURES=90", "-DX=a b", "-DMOA_TORCH_DIR=torch"} <= set(told)
    assert "-UCMAKE_CUDA_ARCHITECTURES" not in told
    with pytest.raises(SystemExit, match="MOA_CUDA='yes': allowed are auto, 0 and 1"):
        translate(MOA_CUDA="yes")


# ---- CMakeLists.txt ----


@pytest.fixture(scope="module")
def configure(setup_py: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """Configures (never builds) in one folder; returns what cmake said."""
    folder = tmp_path_factory.mktemp("cmake")
    ninja = setup_py.find_tool("ninja")
    base = [setup_py.find_tool("cmake"), "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    base += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []

    def run(*arguments: str, expect: int | None = 0) -> str:
        return output_of(*base, *arguments, expect=expect)

    run.folder = folder
    return run


def test_without_nvcc(configure) -> None:
    said = configure("-DMOA_CUDA=auto", "-DMOA_NVCC=0")
    assert "moa_ops: building without CUDA kernels: nvcc was not found at build time." in said
    said = configure("-DMOA_CUDA=1", "-DMOA_NVCC=0", expect=None)
    assert re.search(
        r"^ *moa_ops: MOA_CUDA=1, but nvcc was not found: .*MOA_CUDA=auto\.$", said, re.MULTILINE
    )


def test_wrong_settings(configure, tmp_path: Path) -> None:
    assert "moa_ops: MOA_CUDA=2: allowed are auto, 0 and 1." in configure("-DMOA_CUDA=2", expect=None)
    said = configure("-DMOA_CUDA=0", f"-DMOA_TORCH_DIR={tmp_path}", expect=None)
    assert "pip install 'torch>=2.10'" in said
    old = tmp_path / "old"
    shutil.copytree(
        Path(torch.__file__).parent / "include/torch/csrc/stable", old / "include/torch/csrc/stable"
    )
    (old / "version.py").write_text("__version__ = '2.9.1'\n")
    assert "torch 2.9.1 is too old" in configure("-DMOA_CUDA=0", f"-DMOA_TORCH_DIR={old}", expect=None)


def test_objects_that_run_everywhere_come_first(configure) -> None:
    # Where several objects hold the same inline function, the linker keeps the first: it must not need AVX.
    configure("-DMOA_CUDA=0", "-DMOA_TORCH_DIR=")
    plan = configure.folder / "build.ninja"
    plan = plan if plan.exists() else configure.folder / "CMakeFiles/_C.dir/build.make"
    link = next(line for line in plan.read_text().splitlines() if "_LINKER" in line and "moa_base" in line)
    order = [re.search(r"moa_(?:isa_)?(\w+)\.dir", name).group(1) for name in re.findall(r"\S+\.o\b", link)]
    assert list(dict.fromkeys(order)) == ["base", *(isa for isa in ISAS if isa in order)]
