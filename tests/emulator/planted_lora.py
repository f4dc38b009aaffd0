"""Bugs in the LoRA kernels."""

from emulator.mutations import OUT, RACE, WRONG, plant

TILE = "test_shrink.py -k '(test_ranks and bf16) or (test_widths and bf16 and (129 or 640))'"
UNEVEN = "test_shrink.py -k 'test_uneven_segments and bf16'"
ROW = "-> const T* {\n" + 29 * " " + "return m < place.s.rows ? x + "  # of a tensor-core shrink's x
SLOT = "slot_at(p, place.s.begin + m)"

tile = plant("csrc/lora/mma_tile.cuh", TILE, unit="csrc/lora/shrink.cu")
tile("tile-missing-wait", "      cp_async_wait<kStages - 2>();\n", "", "plain:0", WRONG)
tile(
    "tile-wait-too-short", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();", "plain:0", WRONG
)
tile(
    "tile-missing-barrier",
    "      __syncthreads();  // this stage is there; everybody has left the one that is filled next\n",
    "",
    "tsan:0",
    RACE,
)
tile(
    "tile-stage-in-use",
    "(slot == 0 ? kStages - 1 : slot - 1) * kStage",
    "slot * kStage",
    "tsan:0",
    f"{RACE}|delivered",
)
tile(
    "tile-swapped-a",
    "first_row(0) + lane % 16, 2 * step + lane / 16",
    "first_row(0) + lane / 2, 2 * step + lane % 2",
    "plain:0",
    WRONG,
)
tile("tile-swapped-b", "{now[2 * j], now[2 * j + 1]}", "{now[2 * j + 1], now[2 * j]}", "plain:0", WRONG)
tile(
    "tile-swapped-c",
    "total[frag][i][2 * half], total[frag][i][2 * half + 1]",
    "total[frag][i][half], total[frag][i][half + 2]",
    "plain:0",
    WRONG,
)
tile("tile-not-zeroed", "memset(total, 0, sizeof total);", "", "plain:0", WRONG)
tile("tile-part-kept", "part[m][j][i] = 0.0f;", "", "plain:0", WRONG)
tile("tile-last-step", "(k1 - k0 + kDepth - 1) / kDepth", "(k1 - k0) / kDepth", "plain:0", WRONG)
tile(
    "tile-panel-rows",
    "row < p.rows ? k1 - (k + 8 * chunk) : 0;",
    "k1 - (k + 8 * chunk);",
    "asan:0",
    OUT,
)
plant("csrc/lora/mma_tile.cuh", "test_shrink.py -k no_bank_conflicts", unit="csrc/lora/shrink.cu")(
    "tile-no-swizzle",
    "tile_at<kDepth>(row, chunk); }",
    "row * kDepth + chunk * 8; }",
    "plain:0",
    "bank conflicts",
)

columns = plant("csrc/lora/mma_tile.cuh", "test_shrink.py -k dense_pass", unit="csrc/lora/dense.cu")
columns("dense-first-expert", "expert * p.apart + within", "within", "plain:0", WRONG)
columns("dense-columns-between", "(p.each - within)", "(8)", "asan:0", OUT)
plant("csrc/lora/mma_tile.cuh", "test_shrink.py -k 'own_router and bf16'", unit="csrc/lora/dense.cu")(
    "router-first-stage-unseen",
    "      __syncthreads();  // everybody's copies for the first stage\n",
    "",
    "tsan:0",
    f"{RACE}|delivered",
)
plant("csrc/lora/dense.cu", "test_shrink.py -k dense_pass")(
    "dense-first-tile", "panel.first = lora0 / 8;", "", "plain:0", WRONG
)

finish = plant("csrc/lora/shrink.cu", "test_shrink.py -k 'dense_pass or every_path'")
finish("finish-half-a-warp", "if (lanes == 32) dot += more;", "", "plain:0", WRONG)
finish("finish-unused-ranks", ": clamp(p.ranks[e], 0, p.rank);\n  }", ": p.rank;\n  }", "plain:0", WRONG)
finish(
    "finish-not-routed",
    "routed = there && position < offset_at(p, p.seg.experts)",
    "routed = there",
    "plain:0",
    WRONG,
)

SHRINK_TILE = ("csrc/lora/shrink_tile.cuh", "csrc/lora/shrink.cu")
shrink = plant(SHRINK_TILE[0], UNEVEN, unit=SHRINK_TILE[1])
shrink(
    "shrink-past-the-segment",
    "clamp(left, 0, kRows))",
    "clamp(left + 1, 0, kRows))",
    "tsan:0",
    f"{WRONG}|{RACE}",
)
shrink("shrink-bisection", "at / kRows + mid) <= tile", "at / kRows + mid) < tile", "plain:0", WRONG)
shrink(
    "shrink-row-guard",
    "if (m >= s.rows || n >= columns) return false;",
    "if (n >= columns) return false;",
    "tsan:0",
    f"{OUT}|{RACE}",
)
shrink(
    "shrink-no-zeros",
    "return place.clear(p);\n  const auto element = [&](int64_t i) -> const void* {\n    if",
    "return;\n  const auto element = [&](int64_t i) -> const void* {\n    if",
    "plain:0",
    WRONG,
)
shrink("shrink-dot-lanes", "sum = warp_sum<4>(sum);", "sum = warp_sum<8>(sum);", "plain:0", WRONG)
shrink(
    "shrink-dot-not-written-once",
    "if (threadIdx.x % 4 == 0) place.store_dot",
    "place.store_dot",
    "tsan:0",
    RACE,
)

plant(SHRINK_TILE[0], TILE, unit=SHRINK_TILE[1])(
    "shrink-wrong-token",
    f"{ROW}{SLOT} / p.seg.top_k * p.ldx",
    f"{ROW}{SLOT} * p.ldx",
    "plain:0",
    f"{WRONG}|{OUT}",
)

decode = plant("csrc/lora/decode.cu", "test_decode.py -k 'test_tokens and bf16 or test_flags and f32'")
decode(
    "decode-missing-barrier",
    "logit<A>(p, token + i / experts, i % experts);\n  __syncthreads();",
    "logit<A>(p, token + i / experts, i % experts);",
    "tsan:0",
    RACE,
)
plant("csrc/routing/select.cuh", "test_decode.py -k selection_is_that_of_topk", unit="csrc/lora/decode.cu")(
    "decode-tie-break", "b > a ? __byte_perm", "b >= a ? __byte_perm", "plain:0", WRONG
)
decode_parts = plant(
    "csrc/lora/decode.cuh",
    "test_decode.py -k 'test_tokens and bf16 or test_flags and f32'",
    unit="csrc/lora/decode.cu",
)
decode_parts("decode-scale-of-a-row", "p.scale[e]", "p.scale[j]", "plain:0", f"{WRONG}|{OUT}")
decode_parts("decode-unused-planes", "first + s < splits ?", "first + s < splits - 1 ?", "plain:0", WRONG)
decode(
    "decode-missing-barrier-of-selection",
    "logits, weights, ids));\n  __syncthreads();",
    "logits, weights, ids));",
    "tsan:0",
    f"{RACE}|{OUT}",
)
decode("decode-token-tail", "t < tokens && o < p.out;", "o < p.out;", "tsan:0", f"{OUT}|{RACE}|{WRONG}")
decode("decode-output-tail", "t < tokens && o < p.out;", "t < tokens && o <= p.out;", "asan:0", OUT)

plant(SHRINK_TILE[0], "test_offsets.py -k 'rows and bf16'", unit=SHRINK_TILE[1])(
    "shrink-offset-of-32-bits",
    f"{ROW}{SLOT} / p.seg.top_k * p.ldx",
    f"{ROW}int(unsigned({SLOT} / p.seg.top_k * p.ldx))",
    "plain:0",
    f"{WRONG}|{OUT}",
)
plant("csrc/lora/simt_tile.cuh", "test_shrink.py -k 'misaligned and f32'", unit="csrc/lora/shrink.cu")(
    "simt-misaligned-source",
    "n <= 0      ? none",
    "n <= 0      ? any",
    "plain:0",
    "source of cp.async is misaligned",
)
