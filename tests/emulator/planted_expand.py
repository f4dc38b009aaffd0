"""Bugs in expand-combine."""

from emulator.mutations import OUT, RACE, WRONG, plant

expand = plant(
    "csrc/lora/expand.cu", "test_expand.py -k 'test_ranks and bf16 or test_uneven_segments and bf16'"
)
expand("expand-missing-wait", "        cp_async_wait<0>();\n", "", "plain:0", WRONG)
expand(
    "expand-missing-barrier",
    "        cp_async_wait<0>();\n        __syncthreads();",
    "        cp_async_wait<0>();",
    "tsan:0",
    RACE,
)
expand(
    "expand-panel-in-use",
    "        __syncthreads();  // all have left the panel and the group of before\n",
    "",
    "tsan:0",
    RACE,
)
expand("expand-swapped-c", "c[2 + i] + s->dz", "c[3 - i] + s->dz", "plain:0", WRONG)
expand("expand-tile-not-zeroed", "s->tile[i] = 0.0f;", "static_cast<void>(0);", "plain:0", WRONG)
expand("expand-not-zeroed", "float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};", "float c[4];", "plain:0", WRONG)
expand(
    "expand-output-tail",
    "      if (o >= p.width) continue;\n      float2 sum",
    "      float2 sum",
    "tsan:0",
    f"{OUT}|{RACE}",
)
expand(
    "expand-base-forgotten",
    "if (base != nullptr) sum = add(",
    "if (base == nullptr) sum = add(",
    "plain:0",
    f"{WRONG}|{OUT}",
)
