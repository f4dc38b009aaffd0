"""The sanitizer's script runs to its end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("words", [[], ["--alone"]])
def test_every_operator_runs(
    device, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = Path(__file__).with_name("small.py")
    monkeypatch.setattr(sys, "argv", [str(script), "--device", device.type, *words])
    runpy.run_path(str(script), run_name="__main__")
    assert "every operator ran" in capsys.readouterr().out
