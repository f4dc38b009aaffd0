"""CUDA kernels on the CPU: the same ``.cu`` files, compiled by g++ and run one block after another.

To add a kernel, say ``csrc/lora/shrink.cu`` with its launcher ``shrink_cuda``:

1. ``bind_shrink.cpp`` here: ``MOA_BIND(m) { m.def("shrink", ...); }`` calls the launcher on copies of NumPy
   arrays (``bind.h`` says how, ``bind_demo.cpp`` shows it). Every ``csrc/**/*.cu`` and ``*.cpp`` is compiled.
2. ``test_shrink.py`` here: tests take the fixture ``emulator``, the built module, and run once per way::

       def test_shrink(emulator, rng):
           x = normal(rng, 37, 72, dtype=BF16)           # emulator.arrays: bfloat16 travels as uint16
           h = unwritten(37, 16)                          # NaN where the kernel writes nothing
           emulator.shrink(x, h)
           assert_close(h, ...)                           # float64
           assert_no_conflicts(emulator)                  # shared-memory banks

``python -m pytest --confcutdir=tests/emulator tests/emulator`` runs them without torch (keep to NumPy where
possible). ``MOA_EMULATOR="plain:0 tsan:3"`` names the ways, variant:seed:

========= ===================================================================================================
plain     fast; canaries around shared arrays and buffers; ldmatrix, cp.async and atomics check their bounds
tsan      a race detector; every load and store checks its bounds; bank conflicts of plain loads and stores
asan      AddressSanitizer and UBSan; ``test_asan.py`` runs every test again in a process of its own
seed 0    threads run in index order, to the next barrier each
seed > 0  blocks and warps in a random order, interleaved at shuffles, votes, copies and atomics
========= ===================================================================================================
"""
