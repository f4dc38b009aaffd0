// Every tuning decision of the routing kernels on a GPU, one function a decision. Host code; the figures are arithmetic
// for an H200 (132 multiprocessors, L2 at about 5 TB/s), not measurements.
#pragma once
#include <cstddef>
#include <cstdint>

#include "routing/cuda.h"

namespace moa {
namespace plan_cuda {

// Threads of a block that sorts: 32 warps, as many as a block can have, so that 8192 slots are eight steps.
constexpr int kSortThreads = 1024;
// Of the selection's gradient, a warp a token: 4 blocks a multiprocessor leave 64 registers a thread.
constexpr int kBackwardThreads = 256;

// A bin per expert and one for -1. The sort keeps a row of bins per warp that walks, and two more.
inline size_t sort_shared(int64_t experts, int warps) {
  return static_cast<size_t>(warps + 2) * (experts + 1) * sizeof(int32_t);
}
static_assert(3 * (kMaxExpertsCuda + 1) * sizeof(int32_t) <= kSharedMost, "one walking warp must fit");

// Warps that walk a block's slots: as many as have slots, and as their rows of bins leave room for.
inline int sort_warps(int64_t slots, int64_t experts, int threads) {
  int warps = threads / 32;
  while (warps > 1 && ((warps / 2) * 32 >= slots || sort_shared(experts, warps) > kSharedMost)) warps /= 2;
  return warps;
}

// Threads of a block that sorts: a step of its slots, or eight warps for every 32 bins whose counts it has to add.
inline int sort_threads(int64_t slots_per_block, int64_t experts) {
  int threads = 128;
  while (threads < kSortThreads && (threads < slots_per_block || threads < 8 * (experts + 1))) threads *= 2;
  return threads;
}

// Most blocks of a sort. Every block adds up the histograms of all (blocks^2 * bins integers read from L2), which
// replaces a launch for the scan between them: bounded to 32 MB, some 6 us at most; 8 MB at 128 blocks and 128 experts.
// 128 blocks are about one a multiprocessor and four loads a lane and bin; from half a million slots on, two.
inline int64_t most_sort_blocks(int64_t slots, int64_t experts) {
  int64_t blocks = slots <= (int64_t{1} << 19) ? 128 : 256;
  while (blocks > 1 && blocks * blocks * (experts + 1) * 4 > (int64_t{32} << 20)) blocks -= (blocks + 15) / 16;
  return blocks;
}
// Blocks of the sort alone. One block walks 8192 slots in eight steps of its 32 warps, in about the time that a second
// launch costs. Above, 128 slots a block at least.
inline int64_t sort_blocks(int64_t slots, int64_t experts) {
  if (slots <= 8192) return 1;
  const int64_t blocks = (slots + 127) / 128, most = most_sort_blocks(slots, experts);
  return blocks < most ? blocks : most;
}

// Lanes per token, and logits that each has in registers: few lanes, so that few shuffles are spent on a round of the
// selection, and no more than 16 logits, which leave 64 registers without spills. Above 512 experts rows stay in memory
// (L1 holds them).
struct Topk {
  int lanes, values;  // values 0: rows stay in memory
};
inline Topk topk(int64_t experts, bool f64) {
  if (f64 || experts > 512) return {32, 0};
  if (experts <= 8) return {2, 4};
  if (experts <= 32) return {8, 4};
  if (experts <= 64) return {8, 8};
  if (experts <= 128) return {8, 16};
  return {32, 16};
}

// Launches of routing and sort together:
//   one    a single block selects and sorts, while it needs at most four passes over the tokens (each a few hundred
//          nanoseconds: less than a second launch) and has 4096 slots, four steps of its warps;
//   fused  blocks of selection count their own slots, a second launch sorts them, as many blocks: while that is as many
//          blocks as the tokens fill, or 96, three quarters of the multiprocessors: the last quarter is worth less than
//          the launch it costs. A block has 128 threads at least, so that few tokens are on many multiprocessors;
//   apart  selection over as many blocks as it likes, up to eight rounds of one a multiprocessor (their starting costs
//          nothing beside their tokens then), then histograms, then the scatter.
enum class Launches { one, fused, apart };
struct Route {
  Launches launches;
  int threads;               // of the selection's blocks
  int64_t blocks;            // of the selection
  int64_t tokens_per_block;  // of the selection
};
inline Route route(int64_t tokens, int64_t top_k, int64_t experts, bool f64, bool sorts = true) {
  const int lanes = topk(experts, f64).lanes, at_once = kSortThreads / lanes;
  // Blocks of 128 threads and more, `limit` blocks at most.
  const auto spread = [&](Launches launches, int64_t limit) {
    const int64_t least = 128 / lanes, most = (tokens + least - 1) / least, blocks = most < limit ? most : limit;
    const int64_t each = blocks > 0 ? (tokens + blocks - 1) / blocks : 0;
    int threads = 128;
    while (threads < kSortThreads && threads < each * lanes) threads *= 2;
    return Route{launches, threads, each > 0 ? (tokens + each - 1) / each : 0, each};
  };
  if (!sorts) return spread(Launches::apart, 1056);
  if (tokens * top_k <= 4096 && tokens <= 4 * at_once) {
    int threads = 128;
    while (threads < kSortThreads && (threads < tokens * lanes || threads < tokens * top_k)) threads *= 2;
    return {Launches::one, threads, 1, tokens};
  }
  const int64_t wanted = (tokens + at_once - 1) / at_once, sorting = most_sort_blocks(tokens * top_k, experts);
  const int64_t full = wanted < 96 ? wanted : 96;
  if (sorting >= full) return spread(Launches::fused, sorting);
  const int64_t blocks = wanted < 1056 ? wanted : 1056, each = (tokens + blocks - 1) / blocks;
  return {Launches::apart, kSortThreads, (tokens + each - 1) / each, each};
}

}  // namespace plan_cuda
}  // namespace moa
