"""CUDA kernels on the CPU: the same ``.cu`` files, compiled by g++ and run thread by thread.

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
tsan      a race detector; every load and store checks its bounds; bank conflicts of plain loads and stores;
          nobody reads what nobody has written, of work memory and of outputs that ``unwritten`` made
asan      AddressSanitizer and UBSan; ``test_asan.py`` runs every test again in processes of their own
seed 0    threads run in index order, to the next barrier each
seed > 0  blocks and warps in a random order, interleaved at shuffles, votes, copies and atomics; up to
          four blocks at once, seed % 4 + 1 (``residents``)
========= ===================================================================================================

In ``plain`` every launch runs twice, in two orders, and what it writes must be the same bit by bit
(``repeated.py``). ``MOA_EMULATOR=cuda:0`` runs the same tests on a card, through the operators
(``operators.py``); ``make gpu-check`` does so.

``test_launches.py`` counts what launchers put on a stream, checks grids of sizes that nothing could run
here (``dry``: launches are checked and noted, and nothing runs), and that every kernel in
``tests/cuda_budget.txt`` has run. ``test_offsets.py`` has arrays of more than 2^31 elements whose pages are
not there until they are touched.

How it works. Each CUDA thread is a fiber. One to four blocks are on the machine, and another begins where
one ends; a thread that waits for what another block does (``await``) lets the others run, and if all blocks
on the machine wait so, that is a deadlock, as it would be on a device that has no room for more. The last
lane to reach a warp operation computes it for all (``waits.cpp``, ``fragments.cpp``); lanes that meet in
different lines, masks or operations, and waits that nobody can end, are errors that name the lines. Shared
memory is fresh for every block and full of 0xFF: NaN, or -1. A ``cp.async`` poisons its destination and
delivers at its wait, never earlier. A launch is refused where a device would refuse it: grids, threads,
shared memory beyond 48 KB that was not asked for, or beyond the 99 KB of the smallest card. Global memory
is a copy of exactly the array's size. The build ``tsan`` uses the compiler's ThreadSanitizer
instrumentation, with a run time of its own that knows CUDA's threads (``races.cpp``): no library is
preloaded for it.

Most of a test's time is the emulator's own, so threads switch to each other without the scheduler where
that has nothing to do, what a switch touches lies in few cache lines, accesses to the threads' own stacks
are dropped at once, and the race detector has one cell for the bytes of a word that were always accessed
together.

Limits. It says nothing about speed. Threads never run at once, so there is no weak memory beyond what the
race detector derives from barriers, fences, atomics and counters (``arrive``, ``await``), and a thread that
spins in a loop of its own spins for ever. ``mma`` adds products one by one in float32, in another order
than the hardware: compare with tolerances. The PTX in ``csrc/common/device.cuh`` is not run at all;
``vocabulary.cu`` says what it should do, from the PTX manual, and only a card can confirm it. wgmma, TMA
and mbarrier are unknown here.

``mutations.py`` plants bugs in the kernels (``planted_*.py``) and shows that the tests above catch each.
After a change of a kernel a planted text may no longer be there: the test says so; plant it anew. A new
kernel gets its own ``planted_<kernel>.py``: a missing barrier, wait, guard and mask, a swapped fragment,
a plain add.
"""
