"""Bugs in gram and in the router's backward."""

from emulator.mutations import OUT, RACE, WRONG, plant

BARRIER = "      __syncthreads();  // the stage is there; all have left the one before\n"

for kind, name in ("simt", "f32"), ("mma", "bf16"):
    tests = f"test_gram.py -k 'test_experts_in_pieces and {name} or test_widths and {name}'"
    stream = plant("csrc/lora/gram_stream.cuh", tests, unit="csrc/lora/gram.cu")
    stream(f"gram-{kind}-missing-wait", "      cp_async_wait<1>();\n", "", "plain:0", WRONG)
    stream(f"gram-{kind}-wait-too-short", "cp_async_wait<1>();", "cp_async_wait<2>();", "plain:0", WRONG)
    stream(f"gram-{kind}-missing-barrier", BARRIER, "", "tsan:0", RACE)
    stream(f"gram-{kind}-stage-in-use", "issue(last, parity", "issue(next, parity", "plain:0", WRONG)
    stream(f"gram-{kind}-any-order", BARRIER, "", "plain:0", "depends on the order of threads|error")
    gram = plant("csrc/lora/gram.cu", tests)
    gram(f"gram-{kind}-last-piece", "c <= (stop - 1) / size", "c < (stop - 1) / size", "plain:0", WRONG)

stream("gram-wrong-row", "(threadIdx.x / 2),", "(threadIdx.x % 64),", "plain:0", WRONG)
gram("gram-mma-group-kept", "group[f][i] = 0.0f;", "", "plain:0", WRONG)
gram("gram-mma-swapped-x", "2 * warp + lane / 8 % 2", "2 * warp + lane / 16", "plain:0", WRONG)
gram("gram-mma-share-lost", "share + shares[column]", "share", "plain:0", WRONG)
gram("gram-mma-not-zeroed", "float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};", "float sum[4];", "plain:0", WRONG)

ORDER = "test_gram.py -k 'test_order_of_a_sum or test_widths and f32'"
gram = plant("csrc/lora/gram.cu", ORDER)
gram("gram-simt-group-kept", "group[i] = A(0);", "", "plain:0", WRONG)
gram("gram-simt-wrong-rank", "row * kRanks + part + i] * v", "row * kRanks + i] * v", "plain:0", WRONG)
stream = plant("csrc/lora/gram_stream.cuh", ORDER, unit="csrc/lora/gram.cu")
stream("gram-no-groups", "if (++in_group == p.plan.group)", "if (false)", "plain:0", WRONG)
stream("gram-width-guard", "n = t < 0 ? 0 : p.width - at;", "n = t < 0 ? 0 : kX;", "asan:0", OUT)

ROUTER = "test_gram.py -k 'router and (bf16 or f16)'"
stream = plant("csrc/lora/gram_stream.cuh", ROUTER, unit="csrc/lora/gram.cu")
stream("gram-third-term", "v[2] -= hi.x;", "", "plain:0", WRONG)
stream("gram-scale-lost", "v[q] *= power;", "", "plain:0", WRONG)
stream("gram-scale-of-half-a-warp", "step = 2; step < kWarp", "step = 2; step < 16", "plain:0", WRONG)
gram = plant("csrc/lora/gram.cu", ROUTER)
gram("gram-scaled-sum-kept", "                  sum[i] = 0.0f;\n", "", "plain:0", WRONG)

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
router("router-dx-scale-lost", "sum[i] *= undo_row", "sum[i] /= undo_row", "plain:0", WRONG)
router("router-dx-width-guard", "if (c >= p.in) continue;", "", "asan:0", OUT)
