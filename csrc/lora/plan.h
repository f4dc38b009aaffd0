// Every tuning decision of the LoRA kernels on a CPU, one function a decision. None may depend on the number of threads,
// but for the blocks of the expand and of terms, which change no bit. Figures: two Zen 4 cores (32 KiB L1, 1 MiB L2 each),
// float32, r = 16, k = 2.
#pragma once
#include <cstdint>

#include "common/processor.h"
#include "common/types.h"

namespace moa {
namespace plan {

constexpr int64_t kL1 = 32 * 1024;
constexpr int64_t kTile = 256 * 1024;        // output tile of the expand: a quarter of L2
constexpr int64_t kLargeTile = 2048 * 1024;  // of processors with AMX, whose L2 has as much

// Dense-masked against grouped, on vectors: grouped always. Per 16 outputs of a token the expand does k r multiply-adds
// and, once per expert, a load and a store (about 3 cycles); computing all E experts with zero weights would do E r and
// one load and store. At E = 8, r = 16, k = 2 that is 38 against 131, at E = 4, r = 4, k = 2 it is 14 against 19; they
// meet only where k = E, and there the grouped form computes the same products.
// On tiles (bfloat16 on AMX) a product of 16 tokens, 16 outputs and 32 ranks takes 16 cycles, less than to gather 16
// tokens or to add to 16 rows of y: dense up to so many tiles of all experts' ranks (`groups` of 16, `steps` of 32) for
// each expert chosen, more where it has more tiles. A layer / nn.Linear, two Xeon cores, T = 512, 2048 x 2048, k = 2, grouped
// and dense: shrink E = 2, r = 128 1.60 and 1.40, E = 8, r = 48 1.47 and 1.55; expand E = 8, r = 16 1.29 and 1.26, E = 16 1.33
// and 1.35, E = 24 1.34 and 1.43, r = 32, E = 8 1.34 and 1.36, r = 48, E = 8 1.40 and 1.47, r = 64, E = 4 1.41 and 1.43;
// T = 4096, 256 to 2048, E = 12, r = 48, k = 4 3.7 and 4.0.
inline bool dense_shrink(int64_t tokens, int64_t top_k, int64_t experts, int64_t groups) {
  return tokens >= 64 && groups * experts <= 2 * top_k * (experts + groups);
}
inline bool dense_expand(int64_t tokens, int64_t top_k, int64_t experts, int64_t steps) {
  return tokens >= 64 && steps * experts <= top_k * (2 * experts + steps);
}
// Rows of x that a product on tiles needs, by estimate: a is packed for it, which fewer do not pay for.
constexpr int64_t kTileFewRows = 7;

// Panels (lora/panel.h) against dot products, where a processor has two 512-bit multiply-adds a cycle, which dot products
// cannot feed. One thread of an Emerald Rapids: logits of 64 experts, T = 512, 1024 inputs 118 GF/s by dot products, 150
// by panels, of 179; ranks r = 128, 4096 inputs, E = 2 87 and 122, backward, where B lies turned over already, 52 and
// 125; r = 64, 1024 inputs, E = 16 119 and 112, backward 101 and 115; r = 16 no faster. Four fifths of the lanes must be
// used, and rows enough to pay for turning the panel over, which costs what about 20 save.
inline bool panel_pays(int64_t rows, int64_t columns, const Processor& cpu) {
  return cpu.intel && rows >= 32 && columns >= 32 && 5 * columns >= 4 * ((columns + 15) / 16 * 16);
}
// Router logits by a panel in strips, on AVX2. Two Zen 3 cores, best times, dot products and strips: T = 512, 1024 inputs,
// E = 32 0.308 and 0.292 ms, E = 64 0.485 and 0.445; T = 2048, E = 256 7.4 and 6.2; T = 64, 2048 inputs, E = 64 0.222 and
// 0.183.
inline bool strips_pay(int64_t rows, int64_t columns) { return rows >= 32 && columns >= 32; }
// Ranks that nearly fill a vector of so many lanes, or two, as u = dy B reads them: B as it lies (narrow_tile). us, two
// Xeon cores, u by dot products and so: 1024 x 1024, T = 512, E = 64 270 and 215, T = 2048, E = 256 1,660 and 1,310;
// 2048 x 2048, E = 8 460 and 405.
constexpr int64_t kNarrowSlots = 4;
inline bool narrow_panel(int64_t ranks, int64_t lanes, const Processor& cpu) {
  return cpu.intel && ranks <= 2 * lanes && 5 * ranks >= 4 * ((ranks + lanes - 1) / lanes * lanes);
}
inline bool shrink_panel(int64_t slots, int64_t ranks, bool turned, const Processor& cpu) {
  if (turned && slots >= kNarrowSlots && narrow_panel(ranks, 16, cpu)) return true;
  return (turned || ranks >= 80) && panel_pays(slots, ranks, cpu);
}

// On AVX2 in strips, 24 wide. Two Zen 3 cores, a layer / nn.Linear before and in strips: T = 8192, 256 x 256, E = 2,
// r = 128 2.9 and 2.4 to 2.5; T = 400, 2048 to 512, E = 3, r = 64 1.6 and 1.4; r = 48 no faster.
inline bool shrink_strips(int64_t slots, int64_t ranks) { return slots >= 48 && ranks >= 64; }

// Waking a second thread costs about 3 us: the time to read this much.
inline bool worth_threads(int64_t bytes) { return bytes > 96 * 1024; }

inline int64_t clamp(int64_t v, int64_t lo, int64_t hi) { return v < lo ? lo : v > hi ? hi : v; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kSlots = 256;  // per task of the passes over coefficients and weights

// Shrink: slots per task. 48 rows of 2048 floats fill a third of L2; a task also splits the ranks when there are so
// few slots that one task would hold them all (decode). Where the rows of an expert are repacked, which costs a tenth of
// 48 slots, a task has more, and yet more where they are turned over for a panel: by estimate a twelfth of 128 slots
// at 256 inputs, r = 128.
constexpr int64_t kSlotsInPlace = 48, kSlotsRepacked = 128, kSlotsTurned = 512;
struct Shrink {
  int64_t slots, rank_split;
};
inline Shrink shrink(int64_t slots, int64_t rank, int64_t most) {
  const int64_t chunk = clamp(ceil_div(slots, 4), 6, kSlotsInPlace);
  const int64_t tasks = ceil_div(slots, chunk);
  return {
      chunk == kSlotsInPlace ? clamp(ceil_div(slots, 16), most < kSlotsRepacked ? most : kSlotsRepacked, most) : chunk,
      tasks >= 4 ? rank : clamp(ceil_div(ceil_div(rank, 2), 4) * 4, 4, rank < 4 ? 4 : rank)};
}

// Columns of a task, a multiple of 64 up to `most`: fewer where two threads finish a thirty-second earlier with them.
// 2816 columns are eleven tasks of 256, of which one thread has six, or twenty-two of 128.
inline int64_t even_columns(int64_t width, int64_t most) {
  int64_t best = most, least = ceil_div(ceil_div(width, most), 2) * most;  // columns of the thread that has more tasks
  for (int64_t cols = most - 64; cols >= 128; cols -= 64) {
    const int64_t here = ceil_div(ceil_div(width, cols), 2) * cols;
    if (32 * here >= 31 * least) continue;
    least = here;
    best = cols;
  }
  return best;
}

// Expand: a task owns token_block x col_block outputs. A block of tokens must give each expert enough rows (about 24)
// to pay for repacking its columns of B; the tile then shrinks in width to stay in L2.
struct Expand {
  int64_t token_block, col_block;
};
inline Expand expand(int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t threads,
                     const Processor& cpu) {
  const int64_t want = clamp(24 * experts / top_k, 256, 4096);
  const int64_t blocks = tokens < want * 3 / 2 ? 1 : ceil_div(tokens, want);
  const int64_t token_block = tokens > 0 ? ceil_div(tokens, blocks) : 1;
  int64_t cols = clamp((cpu.amx_bf16 ? kLargeTile : kTile) / 4 / token_block / 64 * 64, 64, 256);
  // Eight tasks, or where the kernels are measured to gain from longer rows, two a thread if those are fewer. us, two Xeon
  // cores with AMX, 128 and 256 columns: 1024 x 1024, T = 512, E = 64 dx 400 and 350, T = 2048, E = 256 2,440 and 2,130.
  const int64_t tasks = cpu.amx_bf16 ? clamp(2 * threads, 4, 8) : 8;
  if (ceil_div(width, cols) * blocks < tasks) cols = clamp(ceil_div(ceil_div(width, tasks), 64) * 64, 64, 256);
  if (blocks % 2 != 0) cols = even_columns(width, cols);
  return {token_block, cols};
}

// Whether y's lines are asked for when a token's first expert has come, for the last one to write. On Intel's processors
// they are gone again by then: a layer / nn.Linear, two Xeon cores, with and without: T = 512, 1024 x 1024, E = 8 1.115 and
// 1.108, E = 64 1.210 and 1.205, T = 2048, E = 256 1.57 and 1.55.
inline bool expand_fetch(const Processor& cpu) { return !cpu.intel; }
// Whether dx asks for the next adapter's rows of A, and dB for the rows it will write. us, two Xeon cores, without and
// with: 1024 x 1024, T = 512, E = 64 dx 440 and 400, dB 490 and 360; T = 2048, E = 256 dx 3,010 and 2,440, dB 2,150 and
// 1,640. Other processors: not measured.
inline bool rows_fetch(const Processor& cpu) { return cpu.intel; }

// Few tokens under large ranks: B is read as it lies, along the ranks, not repacked. At T = 1, 4096x4096, E = 2, r = 128
// a forward goes from 1.17 to 1.15 x nn.Linear; below r = 32 a vector of ranks is not worth its sum across lanes.
// Half types on AVX2, one Zen 3 core, E = k = 2, mixture alone: T = 1, 4096 x 4096, r = 128 bfloat16 412 and 240 us, float16
// 395 and 231; 1024 x 1024, r = 64 60 and 40; T = 2, r = 32 the same.
inline bool along_ranks(int64_t tokens, int64_t rank) { return tokens <= 2 && rank >= 32; }
// Its backward sums along a vector and pays up to more slots. What a training step adds to nn.Linear, in ms, repacked and
// along the ranks, two threads of an Emerald Rapids: 1024 to 4096, E = 8, r = 128, T = 16 3.9 and 2.8, T = 64 6.8 and 5.2;
// 1024x1024, E = 8, r = 64, T = 16 0.70 and 0.62, T = 64 the same; r = 16, T = 8 the same, T = 16 0.34 and 0.38. bfloat16,
// pairs of outputs side by side: a step T = 64, 1536 to 2816, E = 64, r = 128 26.5 and 24.8, T = 16, 2048 x 2048, E = 8,
// r = 64 2.18 and 2.11.
inline bool backward_along_ranks(int64_t slots, int64_t rank) { return slots <= 128 && rank >= 32; }
// Outputs of one run of its backward: bounds float32 rounding, and splits the work into tasks.
constexpr int64_t kShrinkRun = 128;

// The base's product is our own where the library's GEMM, which packs W first, is slower. `most` tokens is what an
// instruction set has (vec.h); short rows have too few products to pay for the sum of their lanes. W 2048 x 2048 against
// F.linear: float32 T = 1 0.4, T = 16 0.4, T = 64 0.6 to 0.8, T = 192 0.9 to 1.0; bfloat16 T = 1 0.3, T = 16 0.75, T = 32
// 0.9; the gradient of x float32 T = 1 0.8, T = 4 0.4, T = 32 0.75, bfloat16 T = 1 0.5, T = 8 0.75. A type that widens as
// it is loaded (not `direct`) has no fast GEMM on most machines: on AVX2 float16 T = 256 0.3, its gradient 0.005.
inline bool few_tokens(int64_t tokens, int64_t in, int64_t most, bool direct) {
  return tokens <= most && (!direct || 8 * tokens <= in);
}
inline bool few_tokens_backward(int64_t tokens, int64_t out, int64_t most, bool direct, bool fast_gemv) {
  if (!direct) return tokens <= most / 4;
  return (tokens > 1 || !fast_gemv) && 4 * tokens <= most && 48 * tokens <= out;
}
// The most tokens where the library is faster than on Zen 4. Two Emerald Rapids cores, W 2048 x 2048: float32 T = 1 0.93,
// T = 4 0.52, T = 32 0.80, T = 64 1.05, T = 192 1.40, gradient T = 1 1.42, T = 8 0.79; bfloat16 by tiles T = 4 0.69, T = 8
// 1.13, T = 32 3.1, gradient T = 1 0.87, T = 2 1.09. A layer in float16 / nn.Linear, two Xeon cores with 480 MB of L3,
// the library's product and ours: T = 1 1.2 and 0.87, T = 16 1.14 and 0.88, T = 32 1.15 and 1.05, T = 48 1.15 and 1.17, a
// step T = 8 1.44 and 1.19, T = 16 the same.
inline bool fast_gemv(DType type, const Processor& cpu) { return type == DType::f32 && cpu.intel; }
inline int64_t most_beside_library(DType type, const Processor& cpu) {
  switch (type) {
    case DType::f32: return cpu.intel ? 32 : INT64_MAX;
    case DType::bf16: return cpu.amx_bf16 ? 4 : INT64_MAX;
    case DType::f16: return cpu.avx512_fp16 ? 32 : INT64_MAX;
    default: return INT64_MAX;
  }
}
// Whether W's next rows are asked for between the products. Intel's processors foresee them: one token, W 4096 x 4096,
// 1.41 ms with prefetches, 1.30 without.
inline bool linear_fetch(const Processor& cpu) { return !cpu.intel; }
constexpr int64_t kLinearBlock = 256;  // tokens at a time, where there are more
constexpr int64_t kLinearPanel = 8;    // rows of W, or pairs of them, between two looks at dx
// Rows of W, which are columns of y, that a task owns; and columns of dx, where W is streamed.
inline int64_t linear_rows(int64_t out) { return clamp(ceil_div(out, 8 * 4) * 4, 4, 64); }
inline int64_t linear_cols(int64_t in) { return clamp(ceil_div(ceil_div(in, 8), 64) * 64, 64, 512); }

// The base's product of more tokens is our own too, from packed blocks of W. On AVX2: half types, which no library
// multiplies there, and float32 beside what MKL has for processors that are not Intel's. Two Zen 3 cores, GF/s, library,
// streamed, packed, W 2048 x 2048: float32 T = 4 21, 70, 48, T = 16 48, 90, 93, T = 24 62, 98, 108, T = 512 150, -, 162,
// W 1024 x 1024 T = 64 82 to 105, -, 135 to 153, T = 512 121 to 131, -, 153 to 158; gradient T = 8 28, 63, 42, T = 16 50, -,
// 61, T = 512 151, -, 156. bfloat16 T = 4 20, 90, -, T = 16 20, 120, 90, T = 48 20, 136, 136, T = 512 20, 130, 165; its
// gradient T = 512 1, -, 143.
// With vectors of 512 bits (`wide`): float32 on Intel's processors, beside MKL at its best. A layer / nn.Linear, two such
// Xeon cores, library and packed, 2048 x 2048, E = 8: T = 33 1.09 and 0.93, T = 64 1.09 and 0.97, T = 192 1.07
// and 1.00, T = 512 1.07 and 1.02; 1024 x 1024 T = 512, E = 64 1.26 and 1.20, T = 4096, E = 16 1.18 and 1.19; a training
// step T = 64 1.13 and 1.16, T = 256 1.11 and 1.10, T = 512 1.09 and 1.08. The same in bfloat16 on AMX's tiles, base and
// dense expand in one sum, was 5 to 11 % faster at T = 64, 0 to 5 % at T = 512, at T = 1024 from 3 % faster to 8 % slower,
// 10 to 15 % slower at T = 4096: L2 and L3 do not feed them faster than oneDNN does. In float32 what the adapters add, as
// terms of the product's tiles or behind each block of its rows, was 1 % slower with E = 8 and 7 % with E = 64: the
// product's own operands need the caches, and y's pass through the expand costs little.
enum class Linear { library, streamed, packed, terms };
inline bool packs(int64_t tokens, bool direct, bool wide, const Processor& cpu) {
  if (wide) return direct && cpu.intel && tokens > 32 && tokens <= 1024;
  return direct ? tokens >= 16 && !cpu.intel : tokens >= 40;
}
inline bool packs_backward(int64_t tokens, bool direct, bool wide, const Processor& cpu) {
  if (wide) return direct && cpu.intel && tokens > 192 && tokens <= 1024;
  return tokens > 8 && !(direct && cpu.intel);
}
// Tokens of a task, and of these the ones that meet the whole block of columns before the next ones: the block of a run
// is 96 KB, their part of it 192 KB; with wide vectors 512 KB, as L2 is, and 192 KB. Half or twice as much of each is no
// faster. Products of a run: they bound float32 rounding too; 512 take 1.03 of the time of 1024 there. Tokens at a time
// where x is converted first.
constexpr int64_t kPackedTokens = 512, kPackedConverted = 1024;
constexpr int64_t packed_block(bool wide) { return wide ? 48 : 96; }
constexpr int64_t packed_run(bool wide) { return wide ? 1024 : 512; }
// Columns of a task: two strips, or one where that makes few tasks.
inline int64_t packed_cols(int64_t width, int64_t strip, bool wide) {
  return wide && ceil_div(width, 2 * strip) < 8 ? strip : 2 * strip;
}

// float32 on AMX is multiplied as terms of bfloat16 (lora/terms.h) from so many tokens on. us, two Xeon cores, library,
// vectors (streamed or packed), terms: W 2048 x 2048 T = 16 1,200, 930, 990, T = 24 1,440, 1,370, 1,040, T = 40 1,810,
// 1,380, 1,390, T = 64 2,400, 1,980, 1,500, its gradient T = 40 1,560, -, 1,700, T = 64 2,100, -, 1,800; 64 to 1024, T = 512
// 245, -, 258, 1024 to 64 343, -, 280; T = 8192, 4096 x 4096 900,000, -, 475,000. In an hour when they were faster: T = 512,
// 2048 x 2048 10,500, 10,100, 5,650, 1024 x 1024 2,670, 2,480, 1,530.
// Tokens come in sixteens: 33 cost what 48 do.
inline bool uses_terms(int64_t tokens, int64_t in, int64_t out) {
  return tokens > 20 && (tokens <= 32 || tokens > 40) && in >= 128 && out >= 64;
}
inline bool uses_terms_backward(int64_t tokens, int64_t in, int64_t out) {
  return tokens > 48 && out >= 128 && in >= 64;
}
// Products of a run, whose sums are added to y at once; and tokens that are split at a time, of so many bytes. At T = 512,
// 2048 x 2048 runs of 256 take 1.1 times as long.
constexpr int64_t kTermsRun = 512, kTermsBytes = 16 * 1024 * 1024;
inline int64_t terms_tokens(int64_t depth) { return clamp(kTermsBytes / (6 * depth) / 32 * 32, 64, 2048); }
// Tokens and columns of a task. Up to 256 columns, three quarters of a MB for a run, as more tokens are read again for
// fewer: 128 take 1.1 times as long. Two tasks a thread: of 128 columns if need be, then of fewer tokens, for which W is
// split again. The bits of a sum depend on neither.
struct Terms {
  int64_t tokens, cols;
};
inline Terms terms(int64_t tokens, int64_t width, int64_t threads) {
  const int64_t tasks = 2 * threads;
  const int64_t cols = clamp(ceil_div(ceil_div(width, tasks), 32) * 32, tokens > 128 ? 128 : 32, 256);
  const int64_t blocks = ceil_div(tasks, ceil_div(width, cols));
  return {clamp(ceil_div(ceil_div(tokens, blocks), 32) * 32, 128, 1024), cols};
}

// Gram: columns per task; its x panel is gathered again for every tile of ranks.
inline int64_t gram_cols(int64_t width) {
  return even_columns(width, width >= 2048 ? 256 : clamp(ceil_div(ceil_div(width, 8), 64) * 64, 64, 256));
}
// Where experts have few slots each, the result and x are most of what moves, in rows that the hardware foresees only if
// they are long: a task has whole rows of some experts, `ranges` of them, instead of some columns of all. `most`: slots of
// the expert that has most, which no range can share. A training step / nn.Linear, two Xeon cores with AVX-512, columns
// and rows, k = 2: T = 512, 1024 x 1024, E = 64 1.41 and 1.37; T = 2048, E = 256 1.75 and 1.63; T = 16, 2048 x 2048,
// E = 64 1.49 and 1.47; T = 2048, E = 64 1.23 and 1.18.
constexpr int64_t kGramTile = 32 * 1024;  // sums of a task then
struct Gram {
  int64_t cols, ranges;
};
inline Gram gram(int64_t slots, int64_t most, int64_t experts, int64_t rank, int64_t width) {
  const int64_t cols = gram_cols(width);
  if (slots > 48 * experts || 8 * most > slots) return {cols, 1};
  const int64_t rows = clamp(kGramTile / rank / 64 * 64, cols, width < 1024 ? width : 1024);
  return {rows, clamp(ceil_div(8, ceil_div(width, rows)), 1, experts)};
}
// The x panel is copied where each of many tiles of ranks reads it again and its rows are a power of two apart, or close
// to it, and share cache sets. One thread of an Emerald Rapids, r = 128, share of the peak in place and copied: 256 inputs
// 0.9 and 0.8, 512 0.78 and 0.74, 768 0.80 and 0.78, 1024 0.43 and 0.72, 1536 0.62 and 0.73, 4096 0.40 and 0.71.
inline bool gram_copied(int64_t rank, int64_t row_bytes) { return rank > 48 && row_bytes >= 4096; }
// Slots of an expert whose dB is summed along its rows instead: where they fill a vector of so many lanes (outer_tile),
// us, two Xeon cores, 1024 x 1024, T = 512, E = 64 360 and 300, T = 2048, E = 256 1,700 and 1,290, but 2048 x 2048,
// T = 512, E = 8 540 and 600.
constexpr int64_t kOuterSlots = 48;
inline bool gram_outer(int64_t slots, int64_t rank, int64_t lanes, const Processor& cpu) {
  return cpu.intel && slots <= kOuterSlots && rank <= lanes && 5 * rank >= 4 * lanes;
}
// Of few slots in any case. bfloat16, a step T = 16, 2048 x 2048, E = 64, r = 64 4.4 and
// 3.9 ms, r = 16 the same.
constexpr int64_t kGramFewSlots = 4;
// Tasks that the zeros of experts without slots are split into: enough for threads to share, where one may be stopped.
constexpr int64_t kGramClearTasks = 16;
// On AVX2 the rows that all tiles of ranks meet before the next ones: their lines of coefficients, and a tile's of x, fit
// into L1. A training step, two Zen 3 cores, T = 8192, 256 x 256, E = 2, r = 128 92 to 100 and 80 ms; r = 48 the same.
constexpr int64_t kGramBlock = 128;
// There x and the coefficients of large ranks are copied into strips, as wide as a tile and as high, and what a tile
// reads stays in L1. Two Zen 3 cores, ms without and with: T = 8192, 256 x 256, E = 2, r = 128 u and dA 19 and 17.5, dB
// 11.4 and 9.6; T = 513, 512 x 512, E = 6, r = 32 dB 0.57 and 0.52; T = 512, 2048 x 2048, E = 8, r = 16 dB 0.70 and 0.75.
inline bool gram_strips(int64_t rank) { return rank > 24; }
// Columns of a task then: whole strips, in an even number of tasks of up to ten.
inline int64_t gram_strip_cols(int64_t width, int64_t strip) {
  const int64_t tasks = 2 * (width / (20 * strip) + 1);
  return clamp(ceil_div(ceil_div(width, tasks), strip), 1, 10) * strip;
}
// A is copied into strips for dx, where it is read often enough: T = 512, 2048 x 2048, E = 8, r = 16 u and dx 1.6 to 1.8
// and 1.3 ms, T = 8192, 256 x 256, E = 2, r = 128 20 and 15.5; with 43 slots an expert, r = 96, 10.5 and 11.
inline bool expand_strips(int64_t slots, int64_t rank) { return slots >= 64 && rank >= 12; }
// Rows summed in one run of accumulators before they are added to the total: bounds float32 rounding.
constexpr int64_t kGramRun = 512;

// Whether a bfloat16 x goes through AMX's tiles. Time on tiles, before W's terms shared a sum, / on vectors: T = 512
// 2048 E = 8 1.22, T = 512 1024 E = 64 0.72, T = 2048 1024 E = 256 0.58.
inline bool router_tiles(int64_t tokens, int64_t experts) { return tokens >= 32 && experts > 16; }
// Rows of a task there: blocks of 64, up to four where that leaves eight tasks.
inline int64_t router_tile_rows(int64_t tokens) { return 64 * clamp(tokens / (8 * 64), 1, 4); }
// Per task: their part of a run is 48 KB, which E / 64 passes read. Fewer where 48 would make few, uneven tasks: of 512
// tokens eleven of 48, which two cores share as six and five, or 22 of 24. T = 512, 1024 inputs, E = 64, a layer /
// nn.Linear 1.218 and 1.214, a step 1.51 and 1.49: hardly beyond the noise.
constexpr int64_t kPanelTokens = 48;
inline int64_t panel_tokens(int64_t tokens, bool wide) {
  return wide && tokens < 1024 ? kPanelTokens / 2 : kPanelTokens;
}
constexpr int64_t kPanelRun = 256;  // products summed in one run of accumulators: bounds float32 rounding
// Router logits in float32 on AMX by terms, as the base's product. us, two Xeon cores, panels and terms: T = 2048, 1024
// inputs, E = 256 2,570 and 1,880; T = 512, E = 128 348 and 308; E = 64 no faster.
inline bool router_terms(int64_t tokens, int64_t experts, int64_t in) {
  return tokens >= 64 && experts >= 96 && in >= 128;
}
// Router logits: tokens and experts per task. Few experts: a tile of x stays in L1 while W streams from L2; many: four
// rows of W stay while the task's 48 rows of x stream.
struct Router {
  int64_t tokens, expert_split;
  bool x_outer;
};
inline Router router(int64_t tokens, int64_t experts) {
  // Sixteen even tasks, or a multiple of it, so that few threads share them evenly.
  const int64_t chunk =
      tokens < 96 ? clamp(ceil_div(tokens, 2), 6, 48) : ceil_div(tokens, 16 * ceil_div(tokens, 16 * 48));
  const int64_t split =
      tokens <= 48 ? clamp(ceil_div(ceil_div(experts, 4), 4) * 4, 8, experts < 8 ? 8 : experts) : experts;
  return {chunk, split, experts <= 16};
}

}  // namespace plan
}  // namespace moa
