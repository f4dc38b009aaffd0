"""Bugs in the routing kernels."""

from emulator.mutations import OUT, RACE, WRONG, plant

SORT = "test_routing.py -k 'test_sort and (20011-513 or 1000-64 or 8192-4096)'"
TOPK = "test_routing.py -k 'experts_and_tokens and (7-64 or 257-65 or 7-513) or ties or every_launch'"
MASKED = "test_routing.py -k flags_and_dtypes"
BACKWARD = "test_routing.py -k backward"

sort = plant("csrc/routing/sort.cuh", SORT, unit="csrc/routing/sort.cu")
sort("sort-rank-mask", "(1u << lane) - 1u", "(2u << lane) - 1u", "plain:0", WRONG)
sort(
    "sort-missing-syncwarp",
    "static_cast<int32_t>(slot + lane);\n      __syncwarp();",
    "static_cast<int32_t>(slot + lane);",
    "tsan:0",
    RACE,
)
sort("sort-minus-one", "id >= 0 && id < experts", "id < experts", "plain:0", WRONG)
sort("sort-tail", "slot < end ? bin_of", "slot <= end ? bin_of", "plain:0", WRONG)
sort("sort-earlier-blocks", "!kAlone && p.blocks > 1 ? before[bin] : 0", "0", "plain:0", WRONG)
sort("sort-carry", "    carry += warp_sum(sum);\n", "", "plain:0", WRONG)
sort(
    "sort-missing-barrier-in-scan",
    "before[bin] : 0);\n    }\n    __syncthreads();",
    "before[bin] : 0);\n    }",
    "tsan:0",
    f"{RACE}|{OUT}",
)
sort("sort-early-lanes", "slot < end ? bin_of", "slot >= end ? bin_of", "tsan:0", "out of bounds")
plant("csrc/routing/plan_cuda.h", SORT, unit="csrc/routing/sort.cu")(
    "sort-small-shared",
    "static_cast<size_t>(warps + 2)",
    "static_cast<size_t>(warps + 1)",
    "plain:0",
    "shared memory",
)

histogram = plant("csrc/routing/sort.cu", "test_routing.py -k 'test_sort and 20011-64'")
histogram(
    "histogram-plain-add",
    "atomicAdd(&bin_counts[step.bin], __popc(step.same))",
    "bin_counts[step.bin] += __popc(step.same)",
    "tsan:0",
    RACE,
)
histogram(
    "histogram-missing-barrier",
    "bin_counts[bin] = 0;\n  __syncthreads();",
    "bin_counts[bin] = 0;",
    "tsan:0",
    RACE,
)

select = plant("csrc/routing/select.cuh", TOPK, unit="csrc/routing/topk.cu")
topk = plant("csrc/routing/topk.cu", TOPK)
select("topk-tie-break", "key > best.key) best", "key >= best.key) best", "plain:0", WRONG)
select("topk-list-order", "b > a ? __byte_perm", "b >= a ? __byte_perm", "plain:0", WRONG)
select(
    "topk-highest-lane",
    "__ffs(static_cast<int>(__ballot_sync(kFullMask, head == best) & kLanes << group)) - 1",
    "31 - __clz(static_cast<int>(__ballot_sync(kFullMask, head == best) & kLanes << group))",
    "plain:0",
    WRONG,
)
select("topk-slot-order", "ids[j] = routed", "ids[k - 1 - j] = routed", "plain:0", WRONG)
topk("topk-dead-groups-count", "token < last, bin_counts", "true, bin_counts", "plain:0", WRONG)
topk(
    "topk-early-exit",
    "route_token<A, L, V>(p, token < last ? token : last - 1, token < last, bin_counts);",
    "if (token < last) route_token<A, L, V>(p, token, true, bin_counts);",
    "plain:0",
    "deadlock|takes no part|diverged",
)
select(
    "topk-plain-count",
    "atomicAdd(&bin_counts[routed ? static_cast<int>(id) : experts.count], 1)",
    "bin_counts[routed ? static_cast<int>(id) : experts.count] += 1",
    "tsan:0",
    RACE,
)
topk(
    "topk-missing-barrier-before-sort",
    "  __syncthreads();\n  if (l.sorts) {",
    "  if (l.sorts) {",
    "tsan:0",
    RACE,
)
topk("topk-not-zeroed", "bin_counts[bin] = 0;", "static_cast<void>(0);", "plain:0", WRONG)

masked = plant("csrc/routing/select.cuh", MASKED, unit="csrc/routing/topk.cu")
masked("topk-mask-ignored", "p.mask == nullptr || p.mask[token]", "true", "plain:0", WRONG)
masked("topk-minus-one-not-written", "ids[j] = routed ? id : -1;", "ids[j] = id;", "plain:0", WRONG)
plant("csrc/routing/scores.cuh", "test_routing.py -k numbers_that_are_none", unit="csrc/routing/topk.cu")(
    "topk-nan-last", "a != a ? 0x7fffffff :", "a != a ? -0x7fffffff :", "plain:0", WRONG
)

backward = plant("csrc/routing/topk_backward.cu", BACKWARD)
backward("backward-missing-syncwarp", "    __syncwarp();\n", "", "tsan:0", RACE)
backward(
    "backward-tail",
    "if (token >= p.tokens) return;",
    "if (token > p.tokens) return;",
    "asan:0",
    "AddressSanitizer",
)
backward("backward-wild-id", "id >= 0 && id < p.experts", "id >= 0", "asan:0", "AddressSanitizer")
backward("backward-wrong-slot", "(dw[i] - n.c) / n.sum", "(dw[0] - n.c) / n.sum", "plain:0", WRONG)

ROOM = "test_routing.py -k 'test_sort and (8192-360 or 8192-744)'"
plant("csrc/routing/plan_cuda.h", ROOM, unit="csrc/routing/sort.cu")(
    "sort-no-room-for-the-scan", "warps) > kSharedMost", "warps) > 99 * 1024", "plain:0", "invalid argument"
)
plant("csrc/common/cuda_api.h", ROOM, unit="tests/emulator/memory.cpp")(
    "sort-not-asked", "40 * 1024", "48 * 1024", "plain:0", "the launch does not ask"
)
