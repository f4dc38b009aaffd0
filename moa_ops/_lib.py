"""Loads the C++ library, moa_ops/_C.abi3.so, and with it the operators ``torch.ops.moa_ops.*``."""

from __future__ import annotations

from pathlib import Path

import torch  # first: the library is linked against torch's own, which this loads

REBUILD = "`pip install --no-build-isolation .` (in a checkout: `pip install --no-build-isolation -e .`)"


def explain(error: ImportError, library: Path) -> str:
    """Says in words why `library` did not load, and what to type.

    Args:
        error: what importing it raised.
        library: where it should be.
    """
    torch_version = str(torch.__version__)
    if not library.exists():
        return f"moa_ops is not built: {library} is missing. Type {REBUILD}."
    if tuple(int(part) for part in torch_version.split(".")[:2]) < (2, 10):
        return f"moa_ops needs torch>=2.10, and this is torch {torch_version}. Type `pip install -U torch`."
    return (
        f"moa_ops: {library} does not load under torch {torch_version}: {error}. Build it again: {REBUILD}."
    )


try:
    from moa_ops import _C  # noqa: F401
except ImportError as error:
    raise ImportError(explain(error, Path(__file__).with_name("_C.abi3.so"))) from error
