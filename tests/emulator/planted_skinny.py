"""Bugs of the base of few tokens: ends of rows, operands, barriers."""

from emulator.mutations import OUT, RACE, WRONG, plant

skinny = plant("csrc/lora/skinny.cu", "test_skinny.py -k 'bf16 and (test_tokens or test_mixture_of_tokens)'")
skinny(
    "skinny-missing-barrier",
    "  __syncthreads();  // all sums are there",
    "  // all sums are there",
    "tsan:0",
    f"{RACE}|{WRONG}",
)
skinny("skinny-depth-tail", "left > kAt && there[i]", "left + 8 > kAt && there[i]", "asan:0", OUT)
skinny(
    "skinny-weight-tail", "kAt * sizeof(T), left > kAt)", "kAt * sizeof(T), left + 8 > kAt)", "asan:0", OUT
)
skinny("skinny-row-tail", "(i < last ? i : last)", "(i)", "asan:0", OUT)
skinny(
    "skinny-row-of-a-neighbour",
    "row[i] = of_row(8 * i + lane / 4)",
    "row[i] = of_row(8 * i + lane / 8)",
    "plain:0",
    WRONG,
)
skinny("skinny-token-tail", "there[i] = t < p.tokens;", "there[i] = t <= p.tokens;", "asan:0", OUT)
skinny("skinny-output-tail", "kSkinnyRows < p.out; };", "kSkinnyRows <= p.out; };", "asan:0", OUT)
skinny("skinny-swapped-columns", "{h.w[f].z, h.w[f].w}", "{h.w[f].w, h.w[f].z}", "plain:0", WRONG)
skinny("skinny-swapped-tokens", "{h.x[0].z, h.x[1].z,", "{h.x[1].z, h.x[0].z,", "plain:0", WRONG)
skinny("skinny-one-run-too-few", "done < runs; ++done", "done < runs - 1; ++done", "plain:0", WRONG)
skinny("skinny-a-warp-forgotten", "w < kSkinnyStreams; ++w", "w < kSkinnyStreams - 1; ++w", "plain:0", WRONG)
skinny(
    "skinny-missing-barrier-of-logits",
    "i / experts, i % experts);\n    __syncwarp();",
    "i / experts, i % experts);",
    "tsan:0",
    RACE,
)
skinny(
    "skinny-coefficients-of-the-first",
    "ids[slot], weights[slot]",
    "ids[slot], weights[first * k]",
    "plain:0",
    WRONG,
)
given = plant("csrc/lora/skinny.cu", "test_skinny.py -k 'bf16 and test_routing_given'")
given("skinny-slot-of-another", "slot >= end) continue", "slot > end) continue", "tsan:0", f"{RACE}|{WRONG}")
given("skinny-no-expert", "ids[slot] < 0 ? 0.0f :", "ids[slot] < -1 ? 0.0f :", "tsan:0", f"{OUT}|{WRONG}")
given("skinny-position-of-the-slot", "slot / k : positions[slot];", "slot / k : slot;", "plain:0", WRONG)
given("skinny-wrong-expert", "offset_at(mid) <= position", "offset_at(mid) < position", "plain:0", WRONG)
