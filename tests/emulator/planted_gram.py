"""Bugs in gram."""

from emulator.mutations import RACE, WRONG, plant

BARRIER = "      __syncthreads();  // the stage is there; all have left the one before\n"

for kind, name in ("simt", "f32"), ("mma", "bf16"):
    gram = plant("csrc/lora/gram.cu", f"test_gram.py -k 'test_experts_in_pieces and {name}'")
    gram(f"gram-{kind}-missing-wait", "      cp_async_wait<1>();\n", "", "plain:0", WRONG)
    gram(f"gram-{kind}-wait-too-short", "cp_async_wait<1>();", "cp_async_wait<2>();", "plain:0", WRONG)
    gram(f"gram-{kind}-missing-barrier", BARRIER, "", "tsan:0", RACE)
    gram(f"gram-{kind}-stage-in-use", "issue(last, parity", "issue(next, parity", "plain:0", WRONG)
    gram(f"gram-{kind}-last-piece", "c <= (stop - 1) / size", "c < (stop - 1) / size", "plain:0", WRONG)

gram("gram-mma-group-kept", "group[f][i] = 0.0f;", "", "plain:0", WRONG)
gram("gram-mma-swapped-x", "2 * warp + lane / 8 % 2", "2 * warp + lane / 16", "plain:0", WRONG)
gram("gram-mma-share-lost", "share + shares[column]", "share", "plain:0", WRONG)
gram("gram-mma-not-zeroed", "float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};", "float sum[4];", "plain:0", WRONG)

gram = plant("csrc/lora/gram.cu", "test_gram.py -k 'test_order_of_a_sum or test_widths and f32'")
gram("gram-simt-group-kept", "group[i] = A(0);", "", "plain:0", WRONG)
gram(
    "gram-simt-wrong-rank",
    "coef[row * kRanks + part + i] * v",
    "coef[row * kRanks + i] * v",
    "plain:0",
    WRONG,
)
gram("gram-simt-no-groups", "if (++in_group == p.plan.group)", "if (false)", "plain:0", WRONG)
gram(
    "gram-simt-width-guard",
    "n = t < 0 ? 0 : p.width - at;",
    "n = t < 0 ? 0 : kX;",
    "asan:0",
    "AddressSanitizer",
)
