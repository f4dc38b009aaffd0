"""CUDA kernels on the CPU: the same ``.cu`` files, compiled by g++ and run one block after another.

To add a kernel (say ``csrc/lora/shrink.cu`` with its launcher ``shrink_cuda``):

1. ``bind_shrink.cpp`` here: ``MOA_BIND(m) { m.def("shrink", ...); }`` calls the launcher on copies of NumPy arrays
   (``bind.h`` says how; ``bind_demo.cpp`` is an example). Every ``csrc/**/*.cu`` and ``bind_*.cpp`` is compiled.
2. ``test_shrink.py`` here: tests take the fixture ``emulator``, the built module, and run once per thread order::

       def test_shrink(emulator, rng):
           x = normal(rng, 37, 72, dtype=BF16)           # emulator.arrays: bfloat16 travels as uint16
           h = unwritten(37, 16)                          # NaN where the kernel writes nothing
           emulator.shrink(x, h)
           assert_close(h, ...)                           # float64
           assert not any(extra for _, extra in emulator.take_conflicts().values())

``python -m pytest --confcutdir=tests/emulator tests/emulator`` runs them without torch; keep to NumPy where possible.
"""
