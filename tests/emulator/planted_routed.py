"""Bugs of blocks that wait for each other: orders, barriers, waits, counters. Seed 7: four at once."""

from emulator.mutations import OUT, RACE, UNWRITTEN, WRONG, plant

TOKENS = "test_routed.py -k 'test_tokens and bf16'"
SORT, SORTED = (
    "sort_block<true>(p.sort, 0, reinterpret_cast<int32_t*>(shared));",
    "block_arrives(&p.counters->sorted, head);",
)
DEADLOCK = "deadlock: every block on the machine waits"

routed = plant("csrc/lora/routed.cu", TOKENS)
routed(
    "routed-no-order",
    "head->arrived = arrive(counter)",
    "head->arrived = atomicAdd(counter, 1u)",
    "tsan:7",
    RACE,
)
routed(
    "routed-no-barrier-before-arrival",
    "  __syncthreads();\n  if (threadIdx.x == 0) head->arrived",
    "  if (threadIdx.x == 0) head->arrived",
    "tsan:7",
    RACE,
)
routed(
    "routed-no-barrier-behind-arrival",
    "  __syncthreads();\n  if (head->arrived + 1",
    "  if (head->arrived + 1",
    "tsan:7",
    RACE,
)
routed(
    "routed-no-barrier-behind-wait",
    "await(counter, value);\n  __syncthreads();",
    "await(counter, value);",
    "tsan:7",
    RACE,
)
routed(
    "routed-no-wait-for-the-sort",
    "wait(&p.counters->sorted, 1);",
    "__syncthreads();",
    "tsan:7",
    RACE,
)
routed(
    "routed-no-wait-for-the-shrink",
    "wait(&p.counters->shrunk, p.shrinks);",
    "__syncthreads();",
    "tsan:7",
    f"{RACE}|{UNWRITTEN}",
)
routed(
    "routed-sorted-too-early",
    f"  {SORT}\n  {SORTED}",
    f"  {SORTED}\n  {SORT}",
    "tsan:7",
    RACE,
)
routed(
    "routed-first-token-sorts",
    "head->arrived + 1 != p.topk.tokens",
    "head->arrived != 0",
    "tsan:7",
    f"{RACE}|{WRONG}|{OUT}",
)
routed(
    "routed-items-backwards",  # who waits, waits for whom nobody has begun
    "head->item = atomicAdd(&p.counters->taken, 1u);",
    "head->item = uint32_t(p.topk.tokens) + p.shrinks + p.expands - 1 - atomicAdd(&p.counters->taken, 1u);",
    "plain:0",
    DEADLOCK,
)

late = plant("csrc/lora/routed.cu", "test_routed.py -k however_many")
late("routed-wait-too-short", "shrunk, p.shrinks)", "shrunk, p.shrinks - 1)", "plain:0", WRONG)

cleared = plant("csrc/lora/dense.cu", TOKENS)
cleared("routed-counters-kept", "p.counters[threadIdx.x] = 0;", "static_cast<void>(0);", "plain:0", DEADLOCK)

planes = plant(
    "csrc/lora/expand_params.cuh", "test_routed.py -k 'test_edges and bf16'", unit="csrc/lora/routed.cu"
)
planes("routed-part-of-h", "i += blocks * kThreads)", "i += 2 * blocks * kThreads)", "plain:0", WRONG)
