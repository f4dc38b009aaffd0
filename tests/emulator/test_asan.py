"""Every kernel test once more, under AddressSanitizer and UBSan, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import build

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_kernels_under_address_sanitizer() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        f"--confcutdir={HERE}",
    ]
    run = subprocess.run(
        [*command, str(HERE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **build.asan_environment(build.build("asan")), "MOA_EMULATOR": "asan:0 asan:7"},
    )
    assert run.returncode == 0, run.stdout
