"""The sanitizer's script runs to its end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


def test_every_operator_runs(device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script = Path(__file__).with_name("small.py")
    monkeypatch.setattr(sys, "argv", [str(script), "--device", device.type])
    runpy.run_path(str(script), run_name="__main__")
    assert "every operator ran" in capsys.readouterr().out
