"""Kernel tests once more, under AddressSanitizer and UBSan, in processes of their own: half of them.

Which half is the names' affair, not the run's. MOA_ASAN=all takes the others too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from emulator import build

HERE = Path(__file__).resolve().parent
OTHERS = sorted(set(HERE.glob("test_*.py")) - {Path(__file__).resolve()})
FILES = [path for path in OTHERS if "emulator: ModuleType" in path.read_text()]

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def run_under_asan(file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, f"--confcutdir={HERE}", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={
            **build.ENVIRONMENT,
            **build.asan_environment(build.build("asan")),
            "MOA_EMULATOR": "asan:7",
            "MOA_EMULATOR_EVERY": "1" if os.environ.get("MOA_ASAN") == "all" else "2",
        },
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[Path, Future]]:
    """All files at once."""
    build.build("asan")
    with ThreadPoolExecutor(build.jobs()) as pool:
        yield {file: pool.submit(run_under_asan, file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_under_address_sanitizer(file: Path, runs: dict[Path, Future]) -> None:
    run = runs[file].result()
    assert run.returncode == 0, run.stdout


def test_every_file_of_kernels_is_among_them() -> None:
    assert {"test_emulator", "test_vocabulary"} <= {file.stem for file in FILES}
