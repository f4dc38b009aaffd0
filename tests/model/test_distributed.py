"""DDP and FSDP2 on two processes: the losses of one, a frozen base, and no rank that waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

HERE = Path(__file__).parent
CASES = ("by id", "teacher forced", "routed", "one adapter")
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without gloo",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("distributed")
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(results: dict[str, Any], how: str, case: str) -> None:
    found = results[case]
    assert found[how] == pytest.approx(found["one process"], rel=2e-6)
    assert found[f"{how} state"] < 1e-4
    assert found[f"{how} base"]


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_is_saved_whole(results: dict[str, Any], case: str) -> None:
    assert results[case]["saved"] == 0.0
    assert results[case]["saved keys"]


@pytest.mark.parametrize("case", CASES)
def test_weights_sent_from_one_process(results: dict[str, Any], case: str) -> None:
    """accelerate's FSDP2 with cpu_ram_efficient_loading."""
    if "sent" not in results[case]:
        pytest.skip("accelerate is not installed")
    assert results[case]["sent"] == pytest.approx(results[case]["one process"], rel=2e-6)
