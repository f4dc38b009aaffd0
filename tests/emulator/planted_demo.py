"""Bugs in the emulator's own kernels: what each variant can see, in its smallest form."""

from emulator.mutations import RACE, UNWRITTEN, WRONG, plant

demo = plant("tests/emulator/demo.cu", "test_emulator.py -k product")
demo("demo-missing-wait", "    cp_async_wait<1>();\n", "", "plain:0", WRONG)
demo(
    "demo-wait-too-short",
    "cp_async_wait<1>();\n    __syncwarp();",
    "cp_async_wait<2>();\n    __syncwarp();",
    "tsan:0",
    "not delivered",
)
demo("demo-missing-syncwarp", "cp_async_wait<1>();\n    __syncwarp();", "cp_async_wait<1>();", "tsan:0", RACE)
demo("demo-missing-padding", "kRow = kK + 8", "kRow = kK", "plain:0", "bank conflicts")
demo(
    "demo-swapped-fragment",
    "lane % 16) * kRow + lane / 16 * 8",
    "lane / 2) * kRow + lane % 2 * 8",
    "plain:0",
    WRONG,
)
demo(
    "demo-misaligned-row",
    "kRow + lane / 16 * 8",
    "kRow + lane / 16 * 4",
    "plain:0",
    "row of ldmatrix is misaligned",
)
demo("demo-not-zeroed", "float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};", "float c[4];", "plain:0", WRONG)
demo("demo-row-guard", "first_row + row < all_rows && ", "", "asan:0", "heap-buffer-overflow")
demo("demo-store-guard", "if (row < p.m && ", "if (row <= p.m && ", "plain:0", "behind the end of a buffer")
demo(
    "demo-small-shared",
    "kStages * kM * kRow * sizeof(T)",
    "kM * kRow * sizeof(T)",
    "plain:0",
    "out of bounds",
)

count = plant("tests/emulator/demo.cu", "test_emulator.py -k count")
count("demo-missing-barrier", "histogram[v] = 0;\n  __syncthreads();", "histogram[v] = 0;", "tsan:0", RACE)
count(
    "demo-plain-add",
    "atomicAdd(&histogram[id], __popc(same))",
    "histogram[id] += __popc(same)",
    "tsan:0",
    RACE,
)
count(
    "demo-plain-global-add",
    "atomicAdd(&counts[v], histogram[v])",
    "counts[v] += histogram[v]",
    "tsan:0",
    RACE,
)
count("demo-minus-one", "if (id >= 0 && ", "if (", "tsan:0", "out of bounds")
count(
    "demo-diverged-match",
    "const unsigned same = __match_any_sync(kFullMask, id);",
    "const unsigned same = i < n ? __match_any_sync(kFullMask, id) : 0;",
    "plain:0",
    "deadlock",
)

sums = plant("tests/emulator/demo.cu", "test_emulator.py -k row_sums")
sums(
    "demo-padding-not-written",
    "if (row < m) rows[i] = column < k ? x[row * k + column] : 0.0f;",
    "if (row < m && column < k) rows[i] = x[row * k + column];",
    "tsan:0",
    UNWRITTEN,
)
sums(
    "demo-counter-not-zeroed",
    "cudaMemsetAsync(taken, 0, sizeof *taken, stream)",
    "cudaSuccess",
    "tsan:0",
    UNWRITTEN,
)

total = plant("tests/emulator/vocabulary.cu", "test_vocabulary.py -k last_block")
total(
    "sum-missing-order", "arrive(counter) == gridDim.x", "atomicAdd(counter, 1u) == gridDim.x", "tsan:0", RACE
)
total(
    "sum-missing-barrier",
    "arrive(counter) == gridDim.x - 1;\n  }\n  __syncthreads();",
    "arrive(counter) == gridDim.x - 1;\n  }",
    "tsan:0",
    RACE,
)
total("sum-counter-kept", "    *counter = 0;  // for the next launch\n", "", "plain:0", "assert")

relay = plant("tests/emulator/vocabulary.cu", "test_vocabulary.py -k relay")
relay("relay-no-order", "arrive(done)", "atomicAdd(done, 1u)", "tsan:0", RACE)
relay("relay-no-barrier-before", "y[i] = x[i];\n      __syncthreads();", "y[i] = x[i];", "tsan:0", RACE)
relay(
    "relay-no-barrier-behind",
    "static_cast<uint32_t>(n));\n      __syncthreads();",
    "static_cast<uint32_t>(n));",
    "tsan:0",
    RACE,
)
relay("relay-no-wait", "await(done, static_cast<uint32_t>(n));", "static_cast<void>(done);", "tsan:0", RACE)
relay(
    "relay-wait-too-short", "await(done, static_cast<uint32_t>(n))", "await(done, n - 1u)", "plain:1", WRONG
)
relay(
    "relay-items-by-block",  # whoever waits does not know that the others run
    "static_cast<int>(atomicAdd(taken, 1u));",
    "static_cast<int>(2 * n - 1 - atomicAdd(taken, 1u));",
    "plain:0",
    "deadlock: every block",
)
