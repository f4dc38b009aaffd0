"""The GPU check without a GPU: timer and cases on the CPU, steps that fail, the record."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_check, gpu_record, gpu_timer, readme, record
from benchmarks.gpu_check import Step, run_step
from benchmarks.inputs import Problem, Shape, check
from benchmarks.record import OURS

CPU = torch.device("cpu")


def test_timer_pairs_and_rotates() -> None:
    calls: dict[str, list[int]] = {"a": [], "b": []}
    functions = {name: calls[name].append for name in calls}
    timings = gpu_timer.measure(functions, "a", CPU, budget=0, min_rounds=4)
    assert timings["a"].ratio.median == 1
    assert timings["b"].rounds == 4
    assert calls["a"] == calls["b"] == [0, 1, 2, 0, 1, 2, 3]


@pytest.fixture(scope="module")
def measured() -> tuple[dict, list[record.Case]]:
    return list(gpu.run(CPU, 0.02, tiny=True))[-1]


def test_cases_hold_ours_the_floor_and_the_others(measured: tuple) -> None:
    facts, cases = measured
    assert facts["copy_gbytes_per_s"] > 0
    assert [case.section for case in cases] == ["forward", "training", gpu.GIVEN, "routing", "mixture"]
    for case in cases:
        assert case.ratio(OURS) > 0
    for case in cases[:2]:
        assert case.facts["floor"] > 1
        assert {"loop", "dense-masked", "grouped_mm", "one PEFT LoRA"} <= case.variants.keys()
        assert case.best_alternative()[0] not in ("one plain LoRA", "one PEFT LoRA")
    assert cases[2].best_alternative()[0] == "gather+bmm"


def test_cases_name_the_kernels_of_ours(measured: tuple) -> None:
    """On a CPU our operators stand for them."""
    _, cases = measured
    forward, training, given, routing, _ = ([k["name"] for k in case.facts["kernels"]] for case in cases)
    assert forward == ["moa_ops::routed_linear"]
    assert any("backward" in name for name in training)
    assert given == ["moa_ops::segment_linear"]
    assert routing == ["moa_ops::topk_routing"]
    (found,) = cases[3].facts["kernels"]
    assert found["launches"] == 1 and 0 < found["seconds"] < 1
    assert "kernels of routing, T=64 E=8 k=2: moa_ops::topk_routing" in gpu_record.table(cases)


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void moa::(anonymous namespace)::dense_mma<__half, moa::Form<2> >(moa::Dense)", "dense_mma"),
        ("moa::(anonymous namespace)::expand_places(moa::OrderParams)", "expand_places"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT"),
        ("void at::native::elementwise_kernel<4, at::native::FillFunctor<int> >(int)", "elementwise_kernel"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_kernels_have_short_names(signature: str, name: str) -> None:
    assert gpu_timer.kernel_name(signature) == name


def test_launches_of_a_kernel_are_summed() -> None:
    launches = [("void a<int>(int)", 1.0), ("b", 4.0), ("void a<float>(int)", 2.0), ("b", 6.0)]
    assert gpu_timer.summed(launches, 2) == [
        {"name": "b", "launches": 1, "seconds": 5.0},
        {"name": "a", "launches": 1, "seconds": 1.5},
    ]


def test_what_flushes_the_cache_is_no_kernel_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(8, 4)
    route = torch.ops.moa_ops.topk_routing
    monkeypatch.setattr(gpu_timer.Clock, "prepare", lambda self: route(logits, 1, 0, False, None, None))
    ours = lambda _: torch.ops.moa_ops.own_linear(logits, logits)  # noqa: E731
    assert [kernel["name"] for kernel in gpu_timer.kernels(ours, CPU)] == ["moa_ops::own_linear"]


@pytest.mark.parametrize("environment", ["/opt/python", f"{gpu_check.ROOT}/.venv"], ids=["outside", "inside"])
def test_a_record_names_no_folder(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", environment)
    say = f"print({str(gpu_check.ROOT / 'setup.py')!r}, {environment + '/lib/x.py'!r})"
    done = run_step(Step("says", "tests", [sys.executable, "-c", say], 60), 60)
    assert done["tail"] == "setup.py lib/x.py\n"


def test_bytes_of_a_mixture() -> None:
    shape = Shape(10, 100, 200, 4, r=2, top_k=2)
    assert gpu.extra_bytes(shape, 2, train=False) == 2 * (10 * (100 + 2 * 200) + 4 * 2 * 300)
    assert gpu.extra_bytes(shape, 2, train=True) == 3 * gpu.extra_bytes(shape, 2, train=False)


def test_plain_routing_is_ours() -> None:
    logits = torch.randn(50, 8)
    weights, indices, ends, order = gpu.plain_routing(logits, 2)
    ours = torch.ops.moa_ops.topk_routing(logits, 2, 0, False, None, None)
    torch.testing.assert_close(weights, ours[0])
    assert torch.equal(indices, ours[1])
    assert torch.equal(ends.int(), ours[2][1:])
    assert torch.equal(order.int(), ours[3])


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Shape(8, 16, 16, 4), torch.float32)
    expected = problem.expected()
    with torch.no_grad():
        problem.layer.lora_B.zero_()
    with pytest.raises(ArithmeticError, match="moa_ops is off"):
        gpu.variants(problem, False, expected)


def run_python(code: str, most: float = 30, left: float = 60, **more: object) -> dict:
    return run_step(Step("step", "tests", [sys.executable, "-c", code], most, **more), left)


class Product:
    """``flashinfer.SegmentGEMMWrapper`` in plain PyTorch, with its arguments."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        assert float_workspace_buffer.dtype is torch.int8

    def run(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        batch_size: int,
        weight_column_major: bool,
        seg_indptr: torch.Tensor,
    ) -> torch.Tensor:
        assert len(weights) == batch_size and seg_indptr.dtype is torch.int64
        weights = weights.transpose(1, 2) if weight_column_major else weights
        ends = seg_indptr.tolist()
        return torch.cat([x[a:b] @ w for a, b, w in zip(ends[:-1], ends[1:], weights, strict=True)])


def test_flashinfer_beside_it_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Shape(24, 64, 48, 4), torch.bfloat16)
    assert gpu.FlashInfer.why_not(problem, train=True) == "has no gradients"
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.FlashInfer.why_not(problem, train=False) == "flashinfer is not installed"
    module = types.ModuleType("flashinfer")
    module.SegmentGEMMWrapper = Product
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module)
    assert gpu.FlashInfer.why_not(problem, train=False) is None
    with torch.no_grad():
        y = gpu.FlashInfer(problem)(problem.x)
    assert check("flashinfer", y, problem.expected(), problem.dtype) > 0
    monkeypatch.setattr(gpu.FlashInfer, "__call__", lambda self, x: 2 * y)
    with torch.no_grad():
        functions, known = gpu.variants(problem, False, problem.expected())
    assert "flashinfer" not in functions and "off by" in known["flashinfer"]["absent"]


def test_step_outcomes() -> None:
    assert run_python("print('fine')")["outcome"] == "ok"
    failed = run_python("print('why'); raise SystemExit(3)")
    assert (failed["outcome"], failed["tail"]) == ("failed (3)", "why\n")
    assert run_python("import time; time.sleep(60)", most=1)["outcome"] == "out of time"
    assert run_python("", left=1)["outcome"] == "left out: no time left"
    assert run_python("", needs="no-such-program")["outcome"] == "left out: no no-such-program"
    assert run_python("import os; print(os.environ['X'])", environment={"X": "y"})["tail"] == "y\n"


def test_steps_are_commands_that_exist() -> None:
    steps = gpu_check.steps(sys.executable, Path("results"), "cuda", 1.0)
    assert {step.group for step in steps} == {"tests", "sanitizer", "bench"}
    for step in steps:
        for word in step.command:
            if word.startswith("tests/"):
                assert (gpu_record.machine.ROOT / word).exists(), word


def test_it_is_expected_to_fit_in_eight_minutes() -> None:
    steps = gpu_check.steps(sys.executable, Path("results"), "cuda", 6.0)
    assert all(0 < step.expected <= step.most for step in steps)
    at_once = max(step.expected for step in steps if not step.alone)
    alone = sum(step.expected for step in steps if step.alone)
    assert gpu_check.BUILD + at_once + alone <= gpu_check.BUILD + gpu_check.LIMIT == 480
    checks = [step.name for step in steps if step.group == "sanitizer"]
    assert checks == ["memcheck", "racecheck", "initcheck"]


def test_the_readme_takes_a_record(tmp_path: Path, measured: tuple, capsys: pytest.CaptureFixture) -> None:
    facts, cases = measured
    path, _ = gpu_record.write(tmp_path, gpu_record.document(CPU, [], facts), cases)
    readme.main([str(path)])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    kinds = [row.split(",")[0] for row in rows[2:]]
    assert kinds == ["| forward", "| training step", "| forward", "| routing"]
    assert f"{cases[0].ratio(OURS):.2f}" in rows[2]
    assert "no GPU, driver None" in text


def test_record_is_written_and_read(tmp_path: Path, measured: tuple) -> None:
    facts, cases = measured
    steps = [{"name": "memcheck", "outcome": "ok", "seconds": 12.0, "tail": ""}]
    document = gpu_record.document(CPU, steps, facts)
    paths = gpu_record.write(tmp_path, document, cases)
    assert [path.suffix for path in paths] == [".json", ".md"]
    told, again = record.load(paths[0])
    assert told["machine"]["name"] == "no GPU"
    assert told["steps"] == steps
    assert [case.key for case in again] == [case.key for case in cases]
    text = paths[1].read_text()
    assert "| memcheck | ok | 12 |" in text
    assert "T=24 64→48 E=4" in text
    assert f"torch {torch.__version__}" in text
    assert gpu_record.folder_name("NVIDIA H200 (80GB)") == "nvidia-h200-80gb"


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        gpu_check.main([])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--only", "nothing"])


def test_one_step_to_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(python: str, results: Path, device: str, budget: float) -> list[Step]:
        good = {"facts": {"copy_gbytes_per_s": 1.0}, "cases": []}
        write = f"open({str(results)!r}, 'w').write({json.dumps(good)!r})"
        return [
            Step("good", "bench", [python, "-c", write], 30),
            Step("bad", "tests", [python, "-c", "1/0"], 30),
        ]

    monkeypatch.setattr(gpu_check, "steps", steps)
    with pytest.raises(SystemExit, match="bad did not pass"):
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path)])
    told, cases = record.load(next(tmp_path.glob("*.json")))
    assert [step["outcome"] for step in told["steps"]] == ["ok", "failed (1)"]
    assert told["facts"] == {"copy_gbytes_per_s": 1.0}
    assert cases == []
