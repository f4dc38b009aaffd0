"""Bugs in shrink, the dense pass and decode."""

from emulator.mutations import RACE, WRONG, plant

RANKS = "test_shrink.py -k 'test_ranks and (16-bf16 or 64-f32)'"

mma = plant("csrc/lora/mma_tile.cuh", RANKS, unit="csrc/lora/shrink.cu")
mma("mma-missing-wait", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();", "plain:0", WRONG)
mma("mma-missing-barrier", "__syncthreads();  // this stage", "// this stage", "tsan:0", RACE)
mma("mma-swapped-fragment", "{b[0], b[1]}", "{b[1], b[0]}", "plain:0", WRONG)

shrink = plant("csrc/lora/shrink.cu", RANKS)
shrink(
    "shrink-segment-tail",
    "clamp(left, 0, kRows)",
    "clamp(left + 1, 0, kRows)",
    "plain:0",
    "behind the end of a buffer",
)
shrink("shrink-dot-of-half-a-quad", "warp_sum<4>(sum)", "warp_sum<2>(sum)", "plain:0", WRONG)
