"""Launches that begin before the one in front has ended, and do not await it, or too late."""

from emulator.mutations import RACE, plant

WITHOUT = "without await_launch"

SKINNY = ("csrc/lora/skinny.cu", "test_skinny.py -k 'bf16 and test_mixture_of_tokens'")
GATES = "    if (count > 0) Gates(p, shared).find(p, first, count);\n"
plant(*SKINNY)("early-skinny", f"    await_launch();\n{GATES}", GATES, "tsan:0", RACE)
plant(*SKINNY)(
    "early-skinny-too-late", f"    await_launch();\n{GATES}", f"{GATES}    await_launch();\n", "tsan:0", RACE
)
for name, file, tests, unit in [
    ("scatter", "csrc/routing/sort.cu", "test_routing.py -k 'test_sort and 20011'", None),
    ("finish", "csrc/lora/shrink.cu", "test_shrink.py -k 'own_router and 2050'", None),
    ("sum", "csrc/lora/dense.cu", "test_router.py -k 'splits and bf16'", None),
    ("gram", "csrc/lora/gram_tile.cuh", "test_gram.py -k 'bf16'", "csrc/lora/gram.cu"),
]:
    plant(file, tests, unit=unit)(f"early-{name}", "  await_launch();\n", "", "tsan:0", f"{RACE}|{WITHOUT}")
plant("tests/emulator/vocabulary.cu", "test_vocabulary.py -k overlap")(
    "early-vocabulary", "  await_launch();\n  const uint32_t bits", "  const uint32_t bits", "tsan:0", RACE
)
WIDE = "test_expand_wide.py"
plant("csrc/lora/expand_wide.cu", WIDE)(
    "early-listed", "  await_launch();\n  wide_block", "  wide_block", "tsan:0", f"{RACE}|{WITHOUT}"
)
for name, old in [
    ("dense", "    if (p.e.dz == nullptr) await_launch();"),
    ("dense-router", "    if (p.e.dz != nullptr) await_launch();  // "),
]:
    plant("csrc/lora/expand_dense.cuh", WIDE, unit="csrc/lora/expand_wide.cu")(
        f"early-{name}", old, "    // ", "tsan:0", f"{RACE}|{WITHOUT}"
    )
plant("csrc/lora/expand_wide.cu", WIDE)(
    "early-fragments",
    "  await_launch();\n  next_may_begin();\n  const Coefficients& c = p.e.c;",
    "  next_may_begin();\n  const Coefficients& c = p.e.c;",
    "tsan:0",
    f"{RACE}|{WITHOUT}",
)
