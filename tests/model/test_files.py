"""Folders replaced whole: kills and errors at every step leave the old one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_ops.model import files
from moa_ops.model.files import atomic_folder, read_tensors, write_json, write_tensors

pytest.importorskip("safetensors")

# Every call by which a save changes the disk.
STEPS = ("mkdir", "open", "fsync", "link", "rename", "rmdir", "unlink", "chmod")


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save(folder: Path, value: float) -> None:
    with atomic_folder(folder, drop=["stale"]) as new:
        (new / "one").mkdir()
        write_tensors(new / "one" / "weights.safetensors", {"w": torch.full((5,), value)})
        write_json(new / "config.json", {"value": value})


def old_folder(folder: Path) -> dict[str, bytes]:
    save(folder, 1.0)
    (folder / "README.md").write_text("mine")
    (folder / "one" / "notes").write_text("mine too")
    (folder / "stale").mkdir()
    (folder / "stale" / "weights").write_text("old")
    return content(folder)


def test_replaces_and_keeps_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    old_folder(folder)
    mode = folder.stat().st_mode
    save(folder, 2.0)
    assert read_tensors(folder / "one" / "weights.safetensors")["w"].tolist() == [2.0] * 5
    assert sorted(content(folder)) == [
        "README.md",
        "config.json",
        "one/notes",
        "one/weights.safetensors",
    ]
    assert folder.stat().st_mode == mode
    assert (folder / "one" / "weights.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_through_a_link_and_over_a_file(tmp_path: Path) -> None:
    save(tmp_path / "real", 1.0)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", 2.0)
    assert (tmp_path / "link").is_symlink()
    assert b"2.0" in (tmp_path / "real" / "config.json").read_bytes()
    with pytest.raises(NotADirectoryError):
        save(tmp_path / "real" / "config.json", 3.0)


def test_links_inside_are_kept(tmp_path: Path) -> None:
    save(tmp_path / "out", 1.0)
    (tmp_path / "out" / "link").symlink_to("one")
    save(tmp_path / "out", 2.0)
    assert os.readlink(tmp_path / "out" / "link") == "one"


def test_an_error_while_writing_changes_nothing(tmp_path: Path) -> None:
    before = old_folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as new:
        (new / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path / "out") == before
    assert len(list(tmp_path.iterdir())) == 1


class Trap:
    """Lets ``happen`` happen at one call of the functions that change the disk, counted from 1."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, happen: Callable[[], None]) -> None:
        self.calls = 0
        for owner, name in [(os, name) for name in STEPS] + [(files, "_exchange")]:
            patch.setattr(owner, name, self.wrap(getattr(owner, name), at, happen))

    def wrap(self, function: Callable[..., Any], at: int, happen: Callable[[], None]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                happen()
            return function(*args, **kwargs)

        return wrapped


def no_space() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("exchange", [True, False])
def test_an_error_of_any_call_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Old where the save reports the error; new where only tidying up afterwards failed."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    before = old_folder(tmp_path / "out")
    for at in range(1, 100):
        with monkeypatch.context() as patch:
            trap = Trap(patch, at, no_space)
            try:
                save(tmp_path / "out", 2.0)
            except OSError:
                assert content(tmp_path / "out") == before
                continue
        assert b"2.0" in (tmp_path / "out" / "config.json").read_bytes()
        if trap.calls < at:
            break
        shutil.rmtree(tmp_path / "out")
        assert old_folder(tmp_path / "out") == before
    assert 15 < at < 99


# A process that forks: each child is killed at another call of its save.
KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import pytest, test_files

out = Path(sys.argv[2])
before = test_files.old_folder(out)
after = None
for at in range(1, 100):
    child = os.fork()
    if child == 0:
        trap = test_files.Trap(pytest.MonkeyPatch(), at, lambda: os._exit(9))
        test_files.save(out, 2.0)
        os._exit(0 if trap.calls < at else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    now = test_files.content(out)
    assert now == before or b"2.0" in now["config.json"] and b"2.0" not in before["config.json"], (at, now)
    if now != before:
        assert after is None or now == after, at
        after = now
    if status == 0:
        print("killed", at - 1, "times")
        break
else:
    raise AssertionError("never came to the end")
"""


def test_a_kill_at_any_call_leaves_old_or_new(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", KILLED, here, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[1]) > 15
