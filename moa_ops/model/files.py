"""Files of adapters and routers: JSON and safetensors, read without trust, and folders replaced whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_MAX_JSON_BYTES = 4 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 4 MiB. Raises ValueError for anything else, NaN included."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; a configuration has at most {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, keys sorted. Raises ValueError for NaN and infinity."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises ValueError where it is damaged."""
    load_file, _, damaged = _safetensors()
    try:
        return load_file(path)
    except (damaged, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file; tensors may share memory and lie on any device."""
    _, save_file, _ = _safetensors()
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(copies, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes for the owner alone


def _safetensors() -> tuple[Any, Any, type[Exception]]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise ImportError("adapters on disk need safetensors: pip install safetensors") from error
    return load_file, save_file, SafetensorError


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], drop: Collection[str] = ()) -> Iterator[Path]:
    """A new folder to write into, which takes the place of ``path`` when the block ends without an error.

    Whoever opens ``path``, also after a process was killed here, sees the old folder or the new one, whole.
    Files of the old folder that the block did not write are kept (by hard links), except those in ``drop``,
    names of entries of the old folder. Both lie side by side for a moment, so the parent must be writable.
    On Linux they are exchanged in one step; where the file system cannot do that, the old one is put aside
    first, and a kill in between leaves it whole beside, as ``.NAME.old-*``. What a killed process had written
    so far stays beside too, as ``.NAME.new-*``, and can be deleted.

    Raises ``NotADirectoryError`` where ``path`` is a file.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; a folder is to be written there")
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new-{secrets.token_hex(8)}")
    new.mkdir()
    try:
        yield new
        _sync_tree(new)
        if target.exists():
            _keep_others(target, new, drop)
        _put(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync_entries(target.parent)


def _keep_others(old: Path, new: Path, drop: Collection[str]) -> None:
    """Links every file of ``old`` that ``new`` lacks."""
    shutil.copymode(old, new)
    for entry in old.iterdir():
        kept = new / entry.name
        if entry.name in drop:
            continue
        if entry.is_dir() and not entry.is_symlink():
            kept.mkdir(exist_ok=True)
            _keep_others(entry, kept, ())
        elif not os.path.lexists(kept):
            try:
                os.link(entry, kept, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(entry, kept, follow_symlinks=False)


def _put(new: Path, target: Path) -> None:
    """Renames ``new`` to ``target``; what was there is removed."""
    if not target.exists():
        os.rename(new, target)
        return
    aside = new
    if not _exchange(new, target):
        aside = target.with_name(f".{target.name}.old-{secrets.token_hex(8)}")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(aside, target)
            raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step (Linux, renameat2). False where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name))
        _sync_entries(Path(root))


def _sync_entries(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can, and none has to for the order of renames
        _sync(folder)


def _sync(path: Path) -> None:
    """Has the system write a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
