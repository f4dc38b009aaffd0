"""Bugs in expand-combine."""

from emulator.mutations import OUT, RACE, UNWRITTEN, WRONG, plant

EXPAND = "csrc/lora/expand.cu"
tile = plant(
    "csrc/lora/expand_tile.cuh",
    "test_expand.py -k 'test_ranks and bf16 or test_uneven_segments and bf16'",
    unit=EXPAND,
)
tile("expand-missing-wait", "        cp_async_wait<kStages - 2>();\n", "", "plain:0", WRONG)
tile(
    "expand-wait-for-one-less",
    "cp_async_wait<kStages - 2>()",
    "cp_async_wait<kStages - 1>()",
    "plain:0",
    WRONG,
)
tile(
    "expand-stage-in-use",
    "        __syncwarp();  // the stage is there",
    "        // the stage is there",
    "tsan:0",
    RACE,
)
tile(
    "expand-swapped-fragment",
    "a[i / 2][2 + i % 2] = w[i].y;",
    "a[i / 2][3 - i % 2] = w[i].y;",
    "plain:0",
    WRONG,
)
tile("expand-swapped-halves", "i == 0 ? 0x5410u : 0x7632u", "i == 0 ? 0x7632u : 0x5410u", "plain:0", WRONG)
tile("expand-not-cleared", "if (begin) clear();", "", "plain:0", WRONG)
tile("expand-fragment-left-out", "at += kFragment;\n    }\n  }", "}\n  }", "plain:0", WRONG)
tile("expand-router-swapped", "[i % 2 * 2] += z.x * w[i];", "[i % 2 * 2] += z.y * w[i];", "plain:0", WRONG)
tile(
    "expand-base-forgotten",
    "base == nullptr || t < 0",
    "base != nullptr || t < 0",
    "plain:0",
    f"{WRONG}|{OUT}",
)
tile("expand-unused-ranks", "ranks = s.used - s.rank;", "ranks = 16;", "plain:0", f"{WRONG}|{OUT}")

edge = plant("csrc/lora/expand_tile.cuh", "test_expand.py -k 'test_widths and bf16'", unit=EXPAND)
edge("expand-output-tail", "if (n > 1) to[1]", "to[1]", "tsan:0", f"{OUT}|{RACE}")
edge("expand-panel-tail", "kByRows ? ranks - j : columns - o;", "8;", "asan:0", OUT)

wide = plant("csrc/lora/expand_tile.cuh", "test_expand.py -k test_strip_after_strip", unit=EXPAND)
wide("expand-strip-ahead", "          ahead_o += kApart;\n", "", "plain:0", WRONG)

finite = plant("csrc/lora/expand_tile.cuh", "test_expand.py -k test_what_is_not_finite", unit=EXPAND)
finite("expand-not-finite", "__any_sync(kFullMask, not_finite(a))", "false", "plain:0", WRONG)

chunks = plant(
    "csrc/lora/expand_coefficients.cuh",
    "test_expand.py -k 'test_chunks_of_experts and 140 or test_token_that_names and bf16'",
    unit=EXPAND,
)
chunks(
    "expand-chunk-in-use", "    __syncthreads();  // all have left the chunk of before\n", "", "tsan:0", RACE
)
chunks(
    "expand-places-missing-barrier",
    "own[i] = {0, -1, 0};\n    __syncthreads();",
    "own[i] = {0, -1, 0};",
    "tsan:0",
    RACE,
)
chunks(
    "expand-places-tail", "i[u] >= 0 && i[u] < count", "i[u] >= 0 && i[u] <= count", "tsan:0", f"{OUT}|{RACE}"
)
chunks(
    "expand-missing-barrier",
    "    __syncthreads();\n    return next;",
    "    return next;",
    "tsan:0",
    f"{RACE}|{WRONG}",
)
chunks(
    "expand-missing-mask", "if (e < from || e >= next) continue;", "if (e < 0) continue;", "plain:0", WRONG
)
chunks(
    "expand-next-chunk", "e0 < experts ? e0 : experts;", "e0 < experts ? e0 + 1 : experts;", "plain:0", WRONG
)
chunks(
    "expand-not-zeroed",
    "*reinterpret_cast<uint4*>(coef + 8 * i) = make_uint4(0, 0, 0, 0);",
    "static_cast<void>(i);",
    "plain:0",
    WRONG,
)
chunks("expand-twin", "for (int twin = 1; twin <=", "for (int twin = 1; twin <", "plain:0", WRONG)
chunks("expand-token-tail", "row >= p.tokens ? -1", "row > p.tokens ? -1", "plain:0", f"{WRONG}|{OUT}")
chunks("expand-plain-or", "atomicOr(&expert[e], 1u << row / 8)", "expert[e] |= 1u << row / 8", "tsan:0", RACE)

WIDE, TILE = "csrc/lora/expand_wide.cu", "csrc/lora/expand_wide.cuh"
LISTED, DENSE = "csrc/lora/expand_listed.cuh", "csrc/lora/expand_dense.cuh"
places = plant(EXPAND, "test_expand_wide.py -k 'test_ranks and bf16 and 16'")
places(
    "expand-place-tail",
    "if (position >= p.c.slots) return;",
    "if (position > p.c.slots) return;",
    "asan:0",
    OUT,
)
places("expand-lower-term", "from_acc<__nv_bfloat16>(w - to_acc(upper))", "upper", "plain:0", WRONG)
pairs = plant(WIDE, "test_expand_wide.py -k 'test_tokens_by_pairs and 20'")
pairs("expand-rows-scan", "sums[warp - 1]", "sums[warp]", "plain:0", f"{WRONG}|{OUT}")
pairs(
    "expand-rows-missing-barrier",
    "  __syncthreads();\n  for (int i = threadIdx.x; i < count; i += kThreads) rows",
    "  for (int i = threadIdx.x; i < count; i += kThreads) rows",
    "tsan:0",
    RACE,
)
fragments = plant(WIDE, "test_expand_wide.py -k 'names_an_expert_twice and bf16 or uneven'")
fragments(
    "expand-fragment-twin",
    "twin <= at.twins; ++twin) {\n        const",
    "twin < 1; ++twin) {\n        const",
    "plain:0",
    WRONG,
)
fragments(
    "expand-fragment-not-zeroed",
    "fragments[i] = make_uint4(0, 0, 0, 0);\n  __syncthreads();",
    "static_cast<void>(i);\n  __syncthreads();",
    "plain:0",
    WRONG,
)
fragments("expand-fragment-kept-unwritten", "total < p.kept ? p.kept :", "", "tsan:0", UNWRITTEN)
fragments("expand-fragment-behind-unwritten", "p.kept : total + 1", "p.kept : total", "tsan:0", UNWRITTEN)
fragments("expand-fragment-of-the-next", "blockIdx.x + 1 < gridDim.x &&", "false &&", "tsan:0", RACE)
fragments(
    "expand-fragment-missing-barrier",
    "fragments[i] = make_uint4(0, 0, 0, 0);\n  __syncthreads();",
    "fragments[i] = make_uint4(0, 0, 0, 0);",
    "tsan:0",
    f"{RACE}|{WRONG}",
)
fragments(
    "expand-fragment-plain-or",
    "atomicOr(&mask[step / 32], 1u << step % 32)",
    "mask[step / 32] |= 1u << step % 32",
    "tsan:0",
    RACE,
)

everyone = plant(WIDE, "test_mixture.py -k 'every_experts and bf16 or own_router'")
for name, old, new, says in [
    ("first-plane", "s < c.planes; ++s, from", "s < 1; ++s, from", WRONG),
    ("plane-of-slots", "(c.all ? p.e.tokens * c.experts : c.slots)", "c.slots", WRONG),
    ("position", "c.all ? token_of(slot) * c.experts + at.expert : position", "position", WRONG),
    ("ids-of-places", "p.e.ids != nullptr ? Place", "p.e.ids == nullptr ? Place", f"{WRONG}|{OUT}"),
]:
    everyone(f"expand-all-{name}", old, new, "plain:0", says)

across = plant(LISTED, "test_expand_wide.py -k '80-bf16 or test_experts and 40'", unit=WIDE)
across(
    "expand-listed-stage-in-use",
    "        __syncthreads();  // the stage is there",
    "        __syncwarp();  // the stage is there",
    "tsan:0",
    RACE,
)
across("expand-listed-other-groups", "takes << at % 4", "takes << (at + 1) % 4", "plain:0", WRONG)
across(
    "expand-listed-step-count",
    "at += i < warp ?",
    "at += i <= warp ?",
    "plain:0",
    f"{WRONG}|{OUT}|misaligned",
)
across("expand-listed-fragments-kept", "next = own + p.kept * 2 * kWarp;", "next = own;", "plain:0", WRONG)
across("expand-listed-neighbour", "g / 2 * 2 + i", "g / 2 * 2 + 1 - i", "plain:0", WRONG)
columns = plant(LISTED, "test_expand_wide.py -k 'column_after and 108'", unit=WIDE)
columns("expand-listed-columns-ahead", "          copied_o += kColumns;\n", "", "plain:0", WRONG)
columns("expand-listed-base", "base[i] = this->base_at(", "base[1 - i] = this->base_at(", "plain:0", WRONG)

dense = plant(DENSE, "test_expand_wide.py -k 'held_and_not or test_ranks and 24'", unit=WIDE)
for name, old, new, way, says in [
    ("first-not-there", "    cp_async_wait<1>();\n", "", "tsan:0", "no cp_async_wait"),
    ("first-without-barrier", "    __syncthreads();  // the first 64", "    // the first 64", "tsan:0", RACE),
    ("bf16-alone", "holds + s >= p.lora_steps", "false", "plain:0", WRONG),
    ("more-of-others", "own + (2 * holds + i) * kWarp", "own + i * kWarp", "plain:0", WRONG),
    ("column", "8 * (n / 2) + 4 * i + 2 * odd", "8 * (n / 2) + 4 * odd + 2 * i", "plain:0", WRONG),
]:
    dense(f"expand-dense-{name}", old, new, way, says)
dense_columns = plant(DENSE, "test_expand_wide.py -k 'test_widths or column_after and 24'", unit=WIDE)
for name, old, new, way, says in [
    (
        "others-not-there",
        "        cp_async_wait<0>();\n        __sync",
        "        __sync",
        "tsan:0",
        "no cp_async_wait",
    ),
    ("others-without-barrier", "        __syncthreads();  // the others", "// the others", "tsan:0", RACE),
    ("unit", "      from += strips * kStrip;\n", "", "plain:0", WRONG),
    ("token-tail", "const bool there = t < p.e.tokens;", "const bool there = true;", "asan:0", OUT),
    ("width-tail", "static_cast<int>(left < 8 ? left : 8)", "8", "asan:0", f"{WRONG}|{OUT}"),
]:
    dense_columns(f"expand-dense-{name}", old, new, way, says)

common = plant(TILE, "test_expand_wide.py -k 'test_widths or test_ranks and bf16 and 24'", unit=WIDE)
common(
    "expand-wide-turn", "v[lo] = upper ? other : v[lo];", "v[lo] = upper ? v[lo] : other;", "plain:0", WRONG
)
common("expand-wide-output-tail", "      if (i < n) to[i] = one[i];", "      to[i] = one[i];", "asan:0", OUT)
for kind, file in [("listed", LISTED), ("dense", DENSE)]:
    plant(file, "test_expand_wide.py -k finite", unit=WIDE)(
        f"expand-{kind}-not-finite", "__any_sync(kFullMask, !this->finite())", "false", "plain:0", WRONG
    )
plant(TILE, "test_expand_wide.py -k finite", unit=WIDE)(
    "expand-wide-chose", "s.router != 0 ? c[row] != 0.0f : chose[row]", "true", "plain:0", WRONG
)

plant("csrc/lora/expand_coefficients.cuh", "test_mixture.py -k 'test_tokens and bf16'", unit=EXPAND)(
    "mixture-first-plane-alone", "s < p.c.planes; ++s) {", "s < 1; ++s) {", "plain:0", WRONG
)
plant("csrc/lora/combine.cuh", "test_mixture.py -k 'test_tokens and f32'", unit=EXPAND)(
    "mixture-planes-of-slots", "at[s * slots * rank]", "at[s * slots]", "plain:0", WRONG
)
WILD = "test_expand.py -k wild_order"
plant("csrc/lora/expand_coefficients.cuh", WILD, unit=EXPAND)(
    "expand-twins-of-chance", "clamp(place[i].twins, 0, p.c.slots - 1)", "place[i].twins", "asan:0", OUT
)
plant("csrc/lora/expand_wide.cu", WILD)(
    "wide-twins-of-chance", "clamp(at.twins, 0, c.slots - 1)", "at.twins", "asan:0", OUT
)
plant("csrc/lora/expand_tile.cuh", "test_offsets.py -k 'adapters and bf16'", unit=EXPAND)(
    "expand-offset-of-32-bits",
    "s.expert * p.c.rank * p.width",
    "int(unsigned(s.expert * p.c.rank * p.width))",
    "plain:0",
    f"{WRONG}|exit status -|{OUT}",
)
