"""Bugs in gram and in the router's backward."""

from emulator.mutations import OUT, RACE, UNWRITTEN, WRONG, plant

BARRIER = "__syncthreads();  // the stage is there; all have left the one before\n"


def here(header: str, tests: str):
    """Bugs of a header that gram.cu alone includes."""
    return plant(f"csrc/lora/{header}", tests, unit="csrc/lora/gram.cu")


PIECES = "test_gram.py -k 'test_experts_in_pieces and {0} or test_widths and {0}'"
simt = here("gram_stream.cuh", PIECES.format("f32"))
simt("gram-simt-missing-wait", "      cp_async_wait<1>();\n", "", "plain:0", WRONG)
simt("gram-simt-wait-too-short", "cp_async_wait<1>();", "cp_async_wait<2>();", "plain:0", WRONG)
simt("gram-simt-missing-barrier", BARRIER, "", "tsan:0", RACE)
simt("gram-simt-stage-in-use", "issue(last, parity", "issue(next, parity", "plain:0", WRONG)
simt("gram-simt-any-order", BARRIER, "", "plain:0", "depends on the order of threads|error")
gram = plant("csrc/lora/gram.cu", PIECES.format("f32"))
gram("gram-simt-last-piece", "c <= (stop - 1) / size", "c < (stop - 1) / size", "plain:0", WRONG)

ORDER = "test_gram.py -k 'test_order_of_a_sum or test_widths and f32'"
gram = plant("csrc/lora/gram.cu", ORDER)
gram("gram-simt-group-kept", "group[i] = T(0);", "", "plain:0", WRONG)
gram("gram-simt-wrong-rank", "row * kRanks + part + i] * v", "row * kRanks + i] * v", "plain:0", WRONG)
simt = here("gram_stream.cuh", ORDER)
simt("gram-no-groups", "if (++in_group == p.plan.group)", "if (false)", "plain:0", WRONG)
simt("gram-width-guard", "n = t < 0 ? 0 : p.width - at;", "n = t < 0 ? 0 : kChunk;", "asan:0", OUT)

tile = here("gram_tile.cuh", PIECES.format("bf16"))
tile("gram-mma-missing-wait", "    cp_async_wait<kStages - 2>();\n", "", "plain:0", WRONG)
tile("gram-mma-wait-too-short", "<kStages - 2>();", "<kStages - 1>();", "plain:0", WRONG)
tile("gram-mma-missing-barrier", BARRIER, "", "tsan:0", RACE)
tile("gram-mma-any-order", BARRIER, "", "plain:0", "depends on the order of threads|error")
tile(
    "gram-mma-stage-in-use",
    "issue(buffer == 0 ? kStages - 1 : buffer - 1, ids)",
    "issue(buffer, ids)",
    "plain:0",
    WRONG,
)
tile("gram-mma-sums-on-a-stage", "  __syncthreads();  // all have left the last stage\n", "", "tsan:0", RACE)
tile("gram-mma-arrives-too-soon", "  __syncthreads();  // the plane is written\n", "", "tsan:0", RACE)
tile("gram-mma-last-piece", "q < piece.pieces", "q + 1 < piece.pieces", "plain:0", WRONG)
tile("gram-mma-group-kept", "group[f][i] = 0.0f;", "", "plain:0", WRONG)
tile("gram-mma-swapped-x", "2 * warp + lane / 8 % 2", "2 * warp + lane / 16", "plain:0", WRONG)
tile("gram-mma-share-lost", "pair + __shfl_xor_sync(kFullMask, pair, 1)", "pair", "plain:0", WRONG)
tile("gram-mma-not-zeroed", "float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};", "float sum[4];", "plain:0", WRONG)
tile("gram-mma-width-guard", "t[q] < 0 ? 0 : columns", "t[q] < 0 ? 0 : 8", "asan:0", OUT)
rows = here("gram_rows.cuh", PIECES.format("bf16"))
rows("gram-mma-counted-from-anything", "p.counters[plane * tiles + t] = 0", "", "plain:0", WRONG)
rows(
    "gram-mma-wrong-row",
    "row % kApart].row[row / kApart]",
    "row / kGramEach].row[row % kGramEach]",
    "plain:0",
    WRONG,
)
rows("gram-mma-piece-too-long", "stages - begin < each ? stages - begin : each", "each", "plain:0", WRONG)

rows = here("gram_rows.cuh", PIECES.format("f16"))
rows("gram-scale-chunk-unwritten", "if (lane < 2) re", "if (lane < 1) re", "tsan:0", UNWRITTEN)

ROUTER = "test_gram.py -k 'router and (bf16 or f16)'"
rows = here("gram_rows.cuh", ROUTER)
rows("gram-third-term", "v[2 * i] -= taken.x;", "", "plain:0", WRONG)
rows("gram-scale-lost", "    v[i] *= powers[i];\n", "", "plain:0", WRONG)
rows("gram-scale-of-half-a-warp", "warp_max(fabsf(v[i]))", "warp_max<16>(fabsf(v[i]))", "plain:0", WRONG)
tile = here("gram_tile.cuh", ROUTER)
tile("gram-scale-kept", "kHalf ? sum[i] * undo[i % 2 * step] : sum[i]", "sum[i]", "plain:0", WRONG)

router = plant("csrc/lora/router_backward.cu", ROUTER)
router(
    "router-dx-experts-in-use",
    "    __syncthreads();  // all have left the experts of before\n",
    "",
    "tsan:0",
    RACE,
)
router("router-dx-missing-barrier", "weight);\n    __syncthreads();\n", "weight);\n", "tsan:0", RACE)
router("router-dx-mid-lost", "{b[2], b[3]}", "{b[0], b[1]}", "plain:0", WRONG)
router(
    "router-dx-as-they-lie",
    "own_column = c0 + column_of(staged)",
    "own_column = c0 + staged",
    "plain:0",
    WRONG,
)
router("router-dx-last-experts", "i < there ? from[i]", "true ? from[i]", "asan:0", OUT)
router("router-dx-first-experts-alone", "    from += kRouterExperts;\n", "", "plain:0", WRONG)
router("router-dx-overwritten", "pair.x + more(2 * q)", "more(2 * q)", "plain:0", WRONG)
router("router-dx-scale-lost", "sum[i] * undo[i / 2] *", "sum[i] *", "plain:0", WRONG)
router("router-dx-width-guard", "if (c >= p.in) continue;", "", "asan:0", OUT)
