// Every tuning decision of the LoRA kernels on a GPU, one function a decision. Host code that tests can call. Figures are
// arithmetic for an H200 (132 multiprocessors, 4.2 TB/s from memory, L2 at about 5.5 TB/s), and measured there where they
// say so.
//
// Instructions: mma.sync, ldmatrix and cp.async, on every architecture. At T = 8192, k = 2, r = 16, width 4096 a shrink
// or an expand is 2.1 GFLOP of use, 4.3 to 15 with its tiles filled up: 7 to 25 us at the 610 TFLOP/s that mma.sync
// reaches, beside 16 to 31 us of bytes. What holds the tiles up, measured, is issuing and waiting for ldmatrix more than
// either: wgmma, which reads shared memory itself, has no form here yet.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/cuda_api.h"
#include "lora/lora.h"

namespace moa {
namespace plan_cuda {

// Counted on every device, so that the split of a sum, and with it the result, is the same on all.
constexpr int64_t kProcessors = 132;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Tiles of shrink and dense ----
// Tensor cores (mma_tile.cuh): a block has `warps`, `across` of which share the columns of 16 row_frags rows; a panel of
// 8 frags rows or columns, and 8 router rows of float32; stages of `depth` k. chained: sums stay on the tensor cores
// from stage to stage.
template <int frags, int router, bool columns, bool chained, int warps, int across, int row_frags, int depth,
          int stages>
struct Form {
  static constexpr int kFrags = frags, kRouter = router, kRowFrags = row_frags, kDepth = depth, kStages = stages;
  static constexpr bool kColumns = columns, kChained = chained;
  static constexpr int kThreads = 32 * warps, kAcross = across, kRows = 16 * row_frags * warps / across;
  // Stages with the router's floats, two of its terms with their scales.
  static constexpr size_t kShared = size_t{stages} * ((kRows + 8 * frags) * depth * 2 + 8 * router * depth * 4) +
                                    2 * (24 * router * depth * 2 + 8 * router * 4);
  static_assert(kShared <= kSharedMost, "sm_86, sm_89 and sm_120 have 99 KB");
};
// 64 rows of x: segments of E = 64 experts have 256 rows at T = 8192, k = 2, and rows that a tile lacks cost no bytes.
constexpr int kTileRows = 64, kTileDepth = 64, kTileThreads = 128;
// Fragments of 8 columns: 2 keep rank 16 in 40 KB, so that five blocks are on a multiprocessor (E = 64: 38 us, of which
// x's bytes are 31); 8 and 16 read x once for ranks up to 64 and 128. Backward a warp has all columns of its rows, and
// with them their dots.
constexpr int kNarrow = 2, kMiddle = 8, kWide = 16;
template <int frags, bool columns>
using GroupedForm = std::conditional_t<
    frags == kNarrow, Form<kNarrow, 0, columns, false, 4, 1, 1, 64, 4>,
    Form<frags, 0, columns, false, 4, columns ? 1 : 2, columns ? 1 : 2, 64, frags == kMiddle ? 4 : 3>>;
static_assert(GroupedForm<kNarrow, false>::kShared <= 48 * 1024, "rank 16 needs no more than every kernel has");
// Dense, many tokens: 128 rows, 128 columns of A or 64 of the router in 128 registers, two blocks of 256 threads on a
// multiprocessor. Stages are half a line of x deep, the other half of which is asked for with it (device.cuh): without
// that, reading x alone takes 32 us instead of 26 (T = 8192, in = 4096; the same in stages of 64). Measured there, E = 8,
// r = 16: A alone 35 us, with the router 42, B 46, 64 experts' logits 49. Blocks of 256 rows, a warp having all columns of
// 32, halve what is read of A from L2, but that is not what it waits for: 44, 52, 46 and 53.
using MixedForm = Form<16, 1, false, true, 8, 2, 2, 32, 4>;
using LoraForm = Form<16, 0, false, true, 8, 2, 2, 32, 4>;
using ColumnsForm = Form<16, 0, true, true, 8, 2, 2, 32, 4>;
using RouterForm = Form<0, 8, false, false, 8, 2, 2, 32, 4>;
constexpr int kDenseRows = MixedForm::kRows;
// Few tokens: four stages, all of the depth of a split.
using FewLoraForm = Form<2, 0, false, false, 4, 1, 1, 64, 4>;
using FewRouterForm = Form<0, 1, false, false, 4, 1, 1, 64, 4>;

// Splits of the depth, so that about two blocks per multiprocessor are there: with fewer, the memory idles. A split has
// at least 256 elements (its stages), and planes are summed by whoever reads them: 16 at most.
inline int64_t splits(int64_t blocks, int64_t depth) {
  const int64_t wanted = blocks >= kProcessors ? 1 : (2 * kProcessors) / most(blocks, 1);
  return most(1, least(least(wanted, 16), depth / (4 * kTileDepth)));
}
inline int64_t split_depth(int64_t depth, int64_t splits) {
  return most(kTileDepth, ceil_div(ceil_div(depth, splits), kTileDepth) * kTileDepth);
}

// Multiply-adds: 32 deep, for then two stages of 64 + 64 rows are static, 37 KB in float32.
constexpr int kSimtDepth = 32;

// ---- Shrink, grouped ----
// Tiles: expert e's start at floor(offsets[e] / 64) + e, an upper bound of the tiles before it, so a tile finds its
// expert by bisection and nobody scans. With fewer slots than experts, one tile per slot, of which those that do not
// start a run of 64 rows of their expert leave at once.
struct Shrink {
  int64_t tiles, columns, column_tiles, splits, depth;
  bool by_slot;
  bool finish;  // a second launch sums the planes, or makes the dot of all columns
};
inline Shrink shrink(int64_t slots, int64_t experts, int64_t rank, int64_t width, DType type, bool dot,
                     bool always_narrow = false) {
  Shrink p{};
  const int64_t by_expert = slots / kTileRows + experts + 1;
  p.by_slot = slots + 1 < by_expert;
  p.tiles = slots == 0 ? 0 : p.by_slot ? slots + 1 : by_expert;
  const bool narrow = rank <= 8 * kNarrow || type == DType::f64 ||  // multiply-adds: 64 columns of float32 fill the
                      always_narrow;                                // registers
  p.columns = narrow ? 8 * kNarrow : type == DType::f32 || rank <= 8 * kMiddle ? 8 * kMiddle : 8 * kWide;
  p.column_tiles = ceil_div(rank, p.columns);
  // Blocks that have work: at most one more per expert than the rows fill.
  const int64_t busy = (slots / kTileRows + least(experts, slots)) * p.column_tiles;
  p.splits = splits(busy, width);
  p.depth = split_depth(width, p.splits);
  p.splits = most(1, ceil_div(width, p.depth));
  p.finish = p.splits > 1 || (dot && p.column_tiles > 1);
  return p;
}

// Lanes per position where planes are added: rank 16 in one access of half a warp.
constexpr int finish_lanes(int64_t rank) { return rank > 16 ? 32 : 16; }

// ---- Dense: every expert's A and the router over the same rows of x ----
// The tile of columns is the fastest index of the grid, so blocks that read the same x run together and L2 serves all
// but the first: x comes from memory once. Both kinds of tiles are in the grid's x: its y and z end at 65535, which is
// 4 million tokens.
enum class DenseKind { few, apart, mixed, simt_narrow, simt_wide };
struct Dense {
  DenseKind kind;
  int64_t rows;                        // of a block
  int64_t router_frags, lora_frags;    // per column tile, of 8 columns
  int64_t router_tiles, column_tiles;  // the router's come first; mixed: a tile holds both kinds
  int64_t row_tiles, splits, depth;
};
constexpr int64_t kChain = 2048;  // of h: 2e-6 (H200), against 1e-6 at 1024 and 4e-6 at 4096
// A wave is two blocks a multiprocessor; a plane costs its writing and reading, about a twentieth of x's.
inline int64_t dense_splits(int64_t blocks, int64_t depth) {
  const int64_t fewest = most(1, ceil_div(depth, kChain)), limit = most(fewest, least(16, depth / 256));
  int64_t best = fewest, cost = INT64_MAX;
  for (int64_t s = fewest; s <= limit; ++s) {
    const int64_t now = ceil_div(blocks * s, 2 * kProcessors) * 10000 / s + 250 * s * blocks / kProcessors;
    if (now < cost) {
      cost = now;
      best = s;
    }
  }
  return best;
}
inline Dense dense(int64_t tokens, int64_t lora_rows, int64_t experts, int64_t width, DType type) {
  Dense p{};
  const bool half = type == DType::bf16 || type == DType::f16;
  const int64_t router = ceil_div(experts, 8), lora = ceil_div(lora_rows, 8);
  // One tile of rows: narrow, so that many blocks fetch A. But each of them reads x again, `tokens` / 16 times A's bytes
  // in all: with 64 tokens, in = 4096 and 512 columns 17 MB from L2, 3 us; with 2048 columns 67 MB, 12 us, where A's own
  // 17 MB take 4 us and 22 wide tiles read 11 MB of x.
  const bool few = tokens <= kTileRows && (tokens <= 16 || router + lora <= 64);
  p.rows = kTileRows;
  if (!half) {  // multiply-adds: 16 or 64 columns
    p.kind = few || type == DType::f64 || router + lora <= kNarrow ? DenseKind::simt_narrow : DenseKind::simt_wide;
    p.router_frags = p.lora_frags = p.kind == DenseKind::simt_narrow ? 2 : 8;
  } else if (few) {
    p.kind = DenseKind::few;
    p.router_frags = 1;
    p.lora_frags = kNarrow;
  } else {
    p.rows = kDenseRows;
    p.lora_frags = kWide;
    // The router's columns spread over A's tiles, where there are enough of those.
    p.kind = lora > 0 && router > 0 && router <= ceil_div(lora, kWide) ? DenseKind::mixed : DenseKind::apart;
    p.router_frags = p.kind == DenseKind::mixed ? 1 : RouterForm::kRouter;
  }
  if (router == 0) p.router_frags = 0;
  if (lora == 0) p.lora_frags = 0;
  p.router_tiles = p.router_frags == 0 ? 0 : ceil_div(router, p.router_frags);
  const int64_t lora_tiles = p.lora_frags == 0 ? 0 : ceil_div(lora, p.lora_frags);
  p.column_tiles = p.kind == DenseKind::mixed ? most(p.router_tiles, lora_tiles) : p.router_tiles + lora_tiles;
  p.row_tiles = ceil_div(tokens, p.rows);
  const int64_t blocks = p.row_tiles * p.column_tiles;
  p.splits = p.rows == kTileRows ? splits(blocks, width) : dense_splits(blocks, width);
  p.depth = split_depth(width, p.splits);
  p.splits = most(1, ceil_div(width, p.depth));
  return p;
}

// Dense against grouped, for the shrink of a routing that is given: grouped reads x k times (2 x 67 MB, 31 us, at T =
// 8192, in = 4096), dense once; its planes are E r wide, 4 MB a split at 128. On tensor cores 128 k columns, all of
// them for all tokens, take less than the bytes saved. Few tokens: the sums are split, and planes would outweigh that.
// Backward the same with dy and B. A tile of B is [64 k][columns] as it lies, r at a time: at rank 16 a row of an expert
// is 32 bytes, one sector, and a stage of 128 columns 16 KB beside dy's 8, from L2 for all but the first rows of blocks
// (E r = 128: 1 MB). A rank between multiples of 8 is filled up: `rank` here is that.
inline bool dense_shrink(int64_t tokens, int64_t top_k, int64_t experts, int64_t rank, bool half) {
  return half && top_k >= 2 && tokens >= 2048 && experts * rank <= least(128 * top_k, 256);
}

// ---- Decode: two launches do router, top-k, shrink and expand ----
// Dense (decode.cu) reads all of A, also of experts that no token can choose: 16 MB of those cost 4 us. Grouped (routed.cu)
// reads what is chosen, but its second launch has three waits between blocks in a row, each a flag through L2 (0.7 us) and
// the slowest block before it: about as much. So dense up to there. Dense keeps the logits and the selection of a block's
// tokens in shared memory: 8 tokens by 512 experts are 16 KB.
constexpr int64_t kDecodeTokens = 64, kDecodeExperts = 512, kDecodeTopK = 64, kDecodeRank = 256;
inline bool decode_dense(int64_t tokens, int64_t top_k, int64_t experts, int64_t rank, int64_t in,
                         int64_t element_bytes) {
  const int64_t idle = experts - least(experts, tokens * top_k);
  return tokens <= kDecodeTokens && experts <= kDecodeExperts && top_k <= kDecodeTopK && rank <= kDecodeRank &&
         idle * rank * in * element_bytes <= (int64_t{16} << 20);
}
// The same with a routing that is given: expand adds the shrink's planes as it reads them, which saves a launch, about
// 2 us. Its 32 blocks (out = 4096) then read up to 16 planes of all slots each, 131 KB at 64 tokens, k = 2, r = 16: 1 us.
// Where a backward wants h, all of its blocks add the planes once more between them: that many bytes in all.
inline bool expand_adds_planes(int64_t tokens) { return tokens <= kDecodeTokens; }
// A block of dense's second launch: 4 tokens and 64 outputs, a thread each. At 16 tokens, out = 4096 that is 256 blocks;
// the planes that each adds again (4 tokens, 16 splits, k r + E columns: 10 KB at k = 2, r = 16, E = 8) are 2.6 MB from L2
// then, and 10 MB, 2 us, at 64 tokens.
constexpr int kDecodeRows = 4, kDecodeColumns = 64, kDecodeThreads = 256;
// B is fetched into L2 before anybody is chosen, while that is 1 us of bytes at most.
inline bool decode_fetch(int64_t bytes) { return bytes <= int64_t{4} << 20; }
// Slots of a token whose coefficients are in shared memory together.
constexpr int decode_round(int rank) { return rank >= kDecodeRank ? 1 : static_cast<int>(kDecodeRank) / rank; }

// The base by skinny.cu: W's bytes, 33.5 MB at 4096 x 4096, are 10 us of an H100's memory; the library's product of 1 or 16
// tokens takes 21 (19 and 2.5 to add its splits), and ours then does what a launch behind it did, which took 14. A block is
// 32 rows of W, eight warps with 4 KB under way each: 32 KB on a multiprocessor, where 3.3 TB/s at 0.8 us need 20; two
// blocks have room where there are more than 132. x is read again by each: 16 tokens are 16.8 MB more from L2. Not measured.
constexpr int kSkinnyRows = 32, kSkinnyStreams = 8, kSkinnyGates = 2;  // the latter two in warps
constexpr int kSkinnyTokens = 16, kSkinnyFetched = 2;  // runs beyond those in registers whose lines L2 is asked for
inline bool skinny(int64_t tokens, int64_t in, int64_t out, int64_t ldx, int64_t ldw) {
  constexpr int64_t kRow = int64_t{1} << 26;  // 32 of them are less than 2^32 bytes
  return tokens >= 1 && tokens <= kSkinnyTokens && in > 0 && in % 8 == 0 && out > 0 && in < kRow && ldx < kRow &&
         ldw < kRow;
}
// With the mixture, each block adds the planes of all tokens' logits and coefficients, two warps of it: up to 16 of each
// at once, 256 times at most, about 10 us, which the base takes as long; beyond that blocks of few tokens do (above).
inline bool skinny_mixture(int64_t tokens, int64_t top_k, int64_t experts, int64_t rank) {
  return experts <= 128 && rank > 0 && tokens * (experts + top_k * (ceil_div(rank, 8) * 8)) <= 1024;
}

// Grouped: every block of the second launch takes items in turn: a token's selection, tiles of the shrink, tiles of the
// expand. At most two blocks are on a multiprocessor (its registers hold two of expand's tiles). The shrink's tiles are
// narrow at every rank: a tile has few rows then (T k slots of up to as many experts), and A's 16 rows outweigh what is
// read again of x. The routing alone is up to three launches at many slots, each 2 us and more; one block sorts at
// least 8192 slots in that time, and the 64 x 4096 that there can be take it 0.1 ms, where A and B have 8 GB.
constexpr int64_t kRoutedBlocks = 2 * kProcessors;
// Of every block's shared memory, in front of what an item needs: what the block knows of the items.
constexpr int kRoutedHead = 16;

// ---- Expand ----
// Multiply-adds: 64 outputs; 32 tokens by 64 sums are 8 KB in float32 (16 KB in float64); 16 ranks of a thread's column
// are registers.
constexpr int kExpandColumns = 64, kExpandThreads = 128;
constexpr int kExpandSimtRows = 32, kExpandSimtRanks = 16;
// Tensor cores: a warp has 128 tokens by 32 columns, 128 sums a thread, two blocks a multiprocessor. A step (16 ranks of
// an expert) is then 32 products at most for 8 + 8 accesses of 128 bytes to shared memory for the panel, and 2 per
// fragment of 8 tokens for the coefficients.
constexpr int kExpandRows = 128, kExpandStrip = 32, kExpandUnit = kExpandStrip * kExpandThreads / 32;
// Stages of 1 KB a warp: three steps ahead, 24 KB on a multiprocessor (5.5 TB/s at 500 ns need 21 KB).
constexpr int kExpandStages = 4;
constexpr int kExpandHead = kExpandThreads / 32 * kExpandStages * 1024 + kExpandRows * 4 + 16, kExpandStep = 16;
// Fragments of coefficients that are kept: 256 are 64 KB, all that k = 2, r = 16 can need, and E r = 256.
constexpr int kExpandFragments = 256;
constexpr int kPlaceThreads = 256;
// Up to so many slots each block looks through all of them, 16 a thread, 8 KB from L2 and about 1 us, instead of a
// launch in front, which is about twice that. With few tokens always, because two launches are all there may be.
constexpr int64_t kPlaceInside = 2048;

struct Expand {
  bool fits, inside;
  int64_t tiles, parts, units;  // a block has a tile of tokens and `units` of 128 columns
  int64_t fragments;
  size_t shared;
};
inline Expand expand(int64_t tokens, int64_t top_k, int64_t experts, int64_t rank, int64_t width, bool router) {
  Expand p{};
  const int64_t depth = ceil_div(rank, 16), tile = kExpandRows / 8;
  p.inside = tokens * top_k <= kPlaceInside || tokens <= kDecodeTokens;
  p.tiles = ceil_div(tokens, kExpandRows);
  // Two rounds of two blocks a multiprocessor: the first's coefficients are made beside the other's products. More would
  // make coefficients more often.
  const int64_t units = ceil_div(width, kExpandUnit);
  p.units = ceil_div(units, most(1, least(units, ceil_div(4 * kProcessors, most(1, p.tiles)))));
  p.parts = ceil_div(units, most(1, p.units));
  // What all tokens can need, up to the limit and what there is room for; one expert with all its ranks at least.
  const int64_t each = 256 + (router ? 32 : 0) + kExpandStep;
  const int64_t places = p.inside ? 8 * least(tokens, kExpandRows) * top_k : 0;
  const int64_t rest = kExpandHead + ceil_div(experts, 2) * 8 + places;
  const int64_t wanted = depth * least(tile * experts, kExpandRows * top_k);
  const int64_t most_shared = static_cast<int64_t>(kSharedMost) - kRoutedHead, room = (most_shared - rest) / each;
  p.fragments = most(tile * depth, least(least(wanted, kExpandFragments), room));
  p.shared = static_cast<size_t>(rest + p.fragments * each);
  p.fits = p.shared <= static_cast<size_t>(most_shared) && experts <= 32767;
  return p;
}

// ---- Expand, many tokens ----
// A block has 256 rows, a warp 32 of them.
constexpr int kWideThreads = 256, kWideGroups = 8, kWideRows = 32 * kWideGroups, kWideColumns = 64;
constexpr int kWideShared = 97 * 1024;  // of a block at most: two are on a multiprocessor
constexpr int kFragmentThreads = 256;
// Steps listed: 64 columns at a time, 64 sums a thread; a step is then 16 products for 4 + 2 accesses of 512 bytes, 24
// cycles of L1 for 26 of the tensor cores. Eight steps a stage, 16 KB, one barrier for each. Two stages of two blocks are
// 64 KB, beside eight fragments a warp of both (64 KB each): left to L1, 42 % of their accesses hit and L2 was 68 % busy.
constexpr int kWideSteps = 8, kWideStages = 2, kWideEntry = 16;
// All steps for all rows: up to 12, which are nearly all that 32 rows take part in as long as rows are not grouped. Eight of
// them are 64 registers of coefficients, and no access; the sums of 32 columns are 32 more. At T = 8192, width 4096, E r
// = 128 that is 14 us of tensor cores and 10 us of shared memory beside 20 us of writing, all of which may go on at once;
// listed, with a barrier for 64 columns, it multiplied, then wrote: 55 us on an H200 and on an H100 alike, though their
// memories differ by 1.4. Not measured.
constexpr int kDenseHeld = 8, kDenseMore = 4;
// Tokens grouped by pairs of experts: 64 by 64 bins, 16 KB, over windows that one block orders.
constexpr int kClusterSide = 64, kClusterThreads = 1024;
constexpr int kClusterWindow = 8192;

// Measured on an H200, bf16, width 4096, r = 16, us, all steps listed (the tile of few tokens in brackets): T = 8192, k = 2,
// E = 8 forward 55 (112), dx with the router 60 (161); E = 64 84 (148), 98 (204); T = 2048, k = 8, E = 128 119 (352). In
// front of it expand_places 2 to 5, expand_fragments 4 (9 at E = 128), expand_rows 7. With the coefficients left to L1 it
// was 74, 64; 112, 106; 114. Copies without branches and unrolled steps, since then, gave an H100 55 and 78.
struct ExpandWide {
  bool fits, cluster, dense;
  int64_t tiles, parts, units;  // a block has a tile of rows and `units` of 64 columns
  int64_t groups;               // of 32 rows
  int depth, lora_steps, steps, words, fragments, entries, kept;
  size_t shared, fragments_shared;
};
// All blocks at once; where there are many tiles, rounds that a last one does not spoil.
inline void set_listed(ExpandWide* p, int64_t units) {
  const int64_t rounds = p->tiles > kProcessors / 2 ? 4 : 1;
  p->units = ceil_div(units, most(1, least(units, 2 * kProcessors * rounds / p->tiles)));
  const int64_t rest = kWideStages * kWideSteps * 16 * kWideColumns * 2 + p->entries * (kWideEntry + 1) +
                       kWideGroups * 4 + kWideRows * 4;
  p->kept = static_cast<int>(
      least(least(p->fragments, 8), (static_cast<int64_t>(kSharedMost) - rest) / (kWideGroups * 1024)));
  p->shared = static_cast<size_t>(rest + p->kept * kWideGroups * 1024);
}
// Rounds of two blocks a multiprocessor; what a block waits for before its first product is about half a unit's time.
inline void set_dense(ExpandWide* p, int64_t units) {
  p->kept = p->steps - static_cast<int>(least(p->lora_steps, kDenseHeld));
  p->fragments = p->steps;
  const int64_t unit = (kDenseHeld + p->kept) * 16 * kWideColumns * 2, rest = p->kept * kWideGroups * 1024;
  int64_t best = INT64_MAX;
  for (int64_t u = 1; u <= least(units, (kWideShared - rest) / unit); ++u) {
    const int64_t cost = ceil_div(p->tiles * ceil_div(units, u), 2 * kProcessors) * (2 * u + 1);
    if (cost >= best) continue;
    best = cost;
    p->units = u;
  }
  p->shared = static_cast<size_t>(rest + p->units * unit);
}
inline ExpandWide expand_wide(int64_t tokens, int64_t top_k, int64_t experts, int64_t rank, int64_t width,
                              bool router) {
  ExpandWide p{};
  // Rows are grouped where E r is above 192: a group's 32 rows then take part in 7 of 64 experts' steps instead of 41, at
  // k = 2. With k = 3 and more the experts of a pair say too little about the others.
  const int64_t depth = ceil_div(rank, 16), eights = router ? ceil_div(experts, 8) : 0;
  const int64_t steps = experts * depth + 2 * eights, words = ceil_div(steps, 32);
  const auto most_of = [&](int64_t slots) { return least(experts, slots) * depth + 2 * least(eights, slots); };
  const int64_t fragments = most_of(32 * top_k), entries = ceil_div(most_of(kWideRows * top_k), 8) * 8;
  p.fits = tokens > kDecodeTokens && tokens * top_k > kPlaceInside && top_k <= 64 && experts <= 32767 &&
           words <= 1024 && least(experts, 32 * top_k) * depth <= 512 && entries <= 2304 && rank > 0;
  if (!p.fits) return p;
  p.cluster = top_k <= 2 && tokens >= 2048 && experts * depth * 16 > 192;
  p.depth = static_cast<int>(depth);
  p.lora_steps = static_cast<int>(experts * depth);
  p.steps = static_cast<int>(steps);
  p.words = static_cast<int>(words);
  p.fragments = static_cast<int>(fragments);
  p.entries = static_cast<int>(entries);
  p.groups = ceil_div(tokens, 32);
  p.tiles = ceil_div(tokens, kWideRows);
  p.dense = !p.cluster && p.steps - least(p.lora_steps, kDenseHeld) <= kDenseMore;
  const int64_t units = ceil_div(width, kWideColumns);
  p.dense ? set_dense(&p, units) : set_listed(&p, units);
  p.parts = ceil_div(units, most(1, p.units));
  p.fragments_shared = static_cast<size_t>(32 * top_k * 8 + words * 8 + 4);
  return p;
}

// ---- Gram, multiply-adds ----
// 16 positions of 64 columns and of 16 ranks, 5 KB in float32; a thread has 8 ranks of a column. Two stages of rows and
// coefficients under way while one is multiplied.
constexpr int kGramSimtColumns = 64, kGramSimtThreads = 128, kGramSimtStages = 3, kGramSimtStage = 16,
              kGramSimtRanks = 16;
// Groups of stages, as many as there are stages in a group. A chain of n additions of terms that are about equal in
// size ends at about 0.4 x 6e-8 x sqrt(n / 2) of the norm in float32: 4096 stages of a million slots in one chain made
// 1e-6 of it; two chains of 64 make 1.9e-7, and 2^29 slots 9e-7.
inline int gram_group(int64_t stages) {
  int group = 1;
  while (int64_t{group} * group < stages) ++group;
  return group;
}
// Pieces of an expert's positions are cut at multiples of the chunk: 16 chunks keep the planes to 32 (8.4 MB at r = 16,
// width 4096, against 134 MB of gathered x at T = 8192, k = 2) and give all tokens to one expert 16 times 64 blocks.
// Below 1024 positions a piece is not worth a plane: 16 ranks of it are then written and read for 64 times its bytes.
// Tiles as in shrink: expert e's start at floor(offsets[e] / chunk) + e.
struct Gram {
  int64_t chunk, chunks, pieces;
  int group;  // stages
};
inline Gram gram(int64_t slots, int64_t experts, int64_t stage) {
  Gram p{};
  p.chunk = most(1024, ceil_div(slots, 16));
  p.chunks = ceil_div(slots, p.chunk);
  p.pieces = slots / p.chunk + experts;
  p.group = gram_group(ceil_div(p.chunk, stage));
  return p;
}

// ---- Gram, tensor cores ----
// 64 positions of 128 columns, 16 KB, and of 16 ranks, 2 KB (3 KB with dz): 57 KB in three stages, so that three blocks
// of 8 warps fit on a multiprocessor and 96 KB of x are under way on it, where 5.5 TB/s of L2 at 1 us need 42 KB. Rows
// of 256 bytes keep the coefficients, that every tile of columns reads again, to an eighth of x at rank 16.
//
// Measured on an H200, dA, dB and d_router at T = 8192, k = 2, r = 16, 4096 columns: 4 us of gram_rows, and 88 us at E
// = 8, 86 at E = 64, L2 at 73 % of what it can. 256 columns by 512 threads and 32 positions took 96 and 90, 32
// positions and four blocks a multiprocessor 92 and 88; 8 or 16 neighbouring tiles before the next piece 87 to 91 and
// 89 to 91.
constexpr int kGramStage = 64, kGramColumns = 128, kGramThreads = 256, kGramStages = 3, kGramBlocks = 3;
// A block has a stage, 4 threads a position: rank 16 of dA and dB at once.
constexpr int kGramRowsThreads = 256;
// Fragments of 8 ranks: 2 have room for rank 16, 8 read x once for ranks up to 64: a thread's sums are 64 registers
// then. In three terms (the router's dW): 4, whose sums are as few and whose terms 12 KB a stage.
constexpr int gram_fragments(bool exact, int64_t rank) { return exact ? 4 : rank <= 16 ? 2 : 8; }
// Pieces: about 2048 blocks where all tokens are one expert's, five rounds of what runs at once, so that the last one
// costs little. But no piece is below 1024 positions, where the plane of 16 ranks is a sixteenth of the bytes of x, and
// there are 32 at most, which make 65 planes.
//
// Groups as above, of 8 stages at least: what tensor cores lose in a chain of 32 products is far below the rounding of
// 16-bit coefficients.
struct GramTiles {
  int64_t chunk, stages, pieces, planes;  // upper bounds, the last three
  int group;                              // stages
};
inline GramTiles gram_tiles(int64_t slots, int64_t experts, int64_t rank, int64_t width, bool exact) {
  GramTiles p{};
  const int64_t tiles = ceil_div(width, kGramColumns) * ceil_div(rank, 8 * gram_fragments(exact, rank));
  p.chunk = most(1024, ceil_div(slots, least(32, ceil_div(2048, most(tiles, 1)))));
  p.stages = slots / kGramStage + experts;
  p.pieces = slots / p.chunk + experts;
  p.planes = slots > p.chunk ? 2 * slots / p.chunk + 1 : 0;
  p.group = static_cast<int>(most(8, gram_group(ceil_div(p.chunk, kGramStage))));
  return p;
}

// ---- The router's dx += dz W, 16-bit dx ----
// 64 tokens by 64 columns, 16 experts at a time: 16 KB of shared memory, and a thread cuts 16 floats of dz and W into terms
// for its 32 sums. dx is read and written once, 134 MB at T = 8192, in = 4096: 31 us; three products of 64 experts are
// 13 GFLOP, 16 us of tensor cores, where multiply-adds would take 4.3 GFLOP, 65 us.
constexpr int kRouterRows = 64, kRouterColumns = 64, kRouterExperts = 16, kRouterThreads = 128;

}  // namespace plan_cuda
}  // namespace moa
