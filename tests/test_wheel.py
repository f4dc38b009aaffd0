"""A wheel as its users find it: in a clean environment, beside a torch that may be a CPU build.

MOA_WHEEL names the file (``make wheel-check`` builds and passes it); without it there is nothing to test.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import cuda_binary

WHEEL = Path(os.environ.get("MOA_WHEEL") or "none")

pytestmark = pytest.mark.skipif(not WHEEL.is_file(), reason="MOA_WHEEL names no wheel; see make wheel-check")

USE = """
import json, sys, torch, moa_ops
from moa_ops import info, ops, reference
layer = moa_ops.MoALinear(64, 48, num_experts=4, r=4)
torch.nn.init.normal_(layer.lora_B)
x = torch.randn(5, 64, requires_grad=True)
y = layer(x)
y.sum().backward()
scaling = layer.scaling
like = (layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.router.weight, 2)
torch.testing.assert_close(y, reference.moa_linear(x, *like, scaling=scaling))
cuda = info.collect()["cuda"]
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moa_ops::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({
    "file": moa_ops.__file__, "version": info.distribution_version(), "cuda": cuda,
    "operators": [name for name in names if has(name, "CPU")],
    "without_cuda": [name for name in names if has(name, "CPU") and not has(name, "CUDA")],
    "cpu": ops.has_kernels("cpu"), "grad": x.grad.isfinite().all().item(),
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel alone, and sees this one's torch."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth is searched, its own .pth files are not read: no editable moa_ops comes in.
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    interpreter = folder / "bin" / "python"
    pip = [
        interpreter,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, WHEEL], check=True)
    return interpreter


def test_name_says_what_is_inside() -> None:
    name, version, python_tag, abi, platform = WHEEL.name.removesuffix(".whl").split("-")
    assert (name, python_tag, abi) == ("moa_ops", "cp310", "abi3")
    assert platform.startswith(("linux_", "manylinux"))
    with zipfile.ZipFile(WHEEL) as wheel:
        names = wheel.namelist()
    assert "moa_ops/_C.abi3.so" in names
    assert "moa_ops/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "examples", "csrc", "build"))]
    assert {n.split("/")[0] for n in names} == {"moa_ops", f"moa_ops-{version}.dist-info"}


def test_runs_on_the_cpu_and_holds_every_architecture(python: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MOA_"))}
    run = subprocess.run(
        [python, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert Path(told["file"]).is_relative_to(python.parent.parent)
    assert told["cpu"]
    assert told["grad"]
    label = told["version"].partition("+")[2]
    if not label.startswith("cu"):
        assert not told["cuda"]["built"]
        return
    assert len(told["operators"]) >= 9
    assert told["without_cuda"] == ["moa_ops::own_linear"]
    assert told["cuda"]["toolkit"].replace(".", "").startswith(label.removeprefix("cu"))
    if cuda_binary.find_cuobjdump() is None:
        pytest.skip("pip install nvidia-cuda-cuobjdump")
    machine, ptx = cuda_binary.architectures(Path(told["file"]).with_name("_C.abi3.so"))
    assert (sorted(machine), sorted(ptx)) == (sorted(cuda_binary.SHIPPED), sorted(cuda_binary.SHIPPED_PTX))
