"""Every launch twice, in two orders of threads and blocks: what kernels write must not depend on it."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np


class Repeated(ModuleType):
    """The module with every launch made twice, the second time in another order of threads and blocks.

    What a kernel writes must be the same bit by bit: an order that a race decides shows here, also where no
    test compares two runs.
    """

    def __init__(self, module: ModuleType, seed: int) -> None:
        super().__init__(module.__name__)
        self.module, self.first = module, seed

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        @functools.wraps(function)
        def twice(*args: Any) -> Any:
            arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
            before = [array.copy() for array in arrays]
            result = function(*args)
            written = [
                (array, old, array.copy())
                for array, old in zip(arrays, before, strict=True)
                if array.tobytes() != old.tobytes()
            ]
            for array, old, _ in written:
                array[...] = old
            if written:
                self.module.seed(self.first + 1)
                function(*args)
                self.module.seed(self.first)
            for array, _, new in written:
                assert array.tobytes() == new.tobytes(), (
                    f"{name}: what it writes depends on the order of threads"
                )
            return result

        return twice
