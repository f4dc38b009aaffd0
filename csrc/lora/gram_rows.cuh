// Gram on tensor cores, in front of the product (gram_tile.cuh): what it takes of each stage of 64 positions of an
// expert, made once and read by all tiles of columns.
//
//   tokens   [stages][64]: whose row of x, -1 for none. Row r of the stage is at r % 16 * 4 + r / 16: four neighbours
//            are those of one thread.
//   records  [stages]: dz in three terms (where it is wanted), then the coefficients of dA, then those of dB
//   pieces   what a block does; counters of pieces done, set to 0
//
// A fragment is [64 positions][8 columns] of T, 1 KB, as ldmatrix wants it. dz's has three columns: hi, mid and lo, of
// which the sum is float32's. Coefficients are one fragment per 8 ranks, rounded to T; kExact (the router's dW): three,
// hi, mid and lo. float16 lacks the range for terms: the 32 positions of a warp are scaled by a power of two, and 1 /
// power, one float a column, stands behind the fragments.
//
// An expert's stages begin at offsets / 64 + e, its pieces at offsets / chunk + e, its planes at 2 offsets / chunk:
// upper bounds of those before it, so that each is found by a search over the offsets and nobody scans.
#pragma once
#include "lora/combine.cuh"

namespace moa {
namespace {

using plan_cuda::kGramColumns;
using plan_cuda::kGramRowsThreads;
using plan_cuda::kGramStage;
using plan_cuda::kGramThreads;

struct GramSide {  // dA: u and x, dB: h and dy
  const void* x;   // [tokens, width], rows ldx apart
  int64_t ldx, width;
  const void* values;            // [slots, rank]
  void* out;                     // [experts, rank, width], or [experts, width, rank] where by_column; or null
  bool x_direct, values_direct;  // rows are whole 16-byte chunks
  bool by_column, out_direct;    // four columns, or eight ranks, can be stored at once
  int units;                     // fragments of ranks, three terms counted as one; 0 where out is null
  int first;                     // their place in a record
  unsigned rank_tiles, tiles;    // of ranks, and of ranks and columns together
};

struct GramPiece {
  int expert, used;          // ranks
  int stage, stages;         // of the records
  int plane, first, pieces;  // its plane and the expert's first one, where the expert has several pieces
  int there;
};

// Whose rows of x a thread copies, -1 for none: rows kGramStage / kGramEach apart.
constexpr int kGramEach = kGramStage * kGramColumns / 8 / kGramThreads;
struct alignas(4 * kGramEach) GramTokens {
  int row[kGramEach];
};

struct GramTiles {
  Coefficients c;  // but for the values
  GramSide side[2];
  const void* dz;   // [slots] or null
  float* d_router;  // [experts, width of side 0] or null
  bool out_f32;
  plan_cuda::GramTiles plan;
  int record;          // bytes
  int shared;          // bytes of a record that a stage has room for
  GramTokens* tokens;  // [plan.stages][kGramStage / kGramEach]
  unsigned char* records;
  GramPiece* pieces;   // [plan.pieces]
  uint32_t* counters;  // [plan.planes][tiles of both sides]
  float* planes;       // [plan.planes][tiles of both sides][kFrags 8 + 1][kGramColumns]
};

constexpr int kGramFragment = kGramStage * 16;  // bytes
template <class T>
constexpr int kGramDz = kGramFragment + (std::is_same<T, __half>::value ? 16 : 0);
template <class T, bool kExact>
constexpr int kGramUnit =
    (kExact ? 3 : 1) * kGramFragment + (kExact && std::is_same<T, __half>::value ? kGramStage / kWarp * 32 : 0);

// The last expert that starts at or before `at`; starts ascend. A whole warp.
template <class Start>
__device__ __forceinline__ int64_t expert_at(int64_t experts, int64_t at, const Start& start) {
  const int lane = threadIdx.x % kWarp;
  int64_t lo = 0;
  while (experts > 1) {
    const int64_t step = (experts + kWarp - 1) / kWarp, e = lane * step;
    const unsigned yes = __ballot_sync(kFullMask, e < experts && start(lo + e) <= at);
    const int64_t skipped = (yes == 0 ? 0 : __popc(yes) - 1) * step;
    lo += skipped;
    experts = step < experts - skipped ? step : experts - skipped;
  }
  return lo;
}

__device__ __forceinline__ void put_piece(const GramTiles& p, int64_t tile) {
  const int64_t chunk = p.plan.chunk;
  const auto start = [&](int64_t e) { return p.c.offset_at(e) / chunk + e; };
  const int64_t e = expert_at(p.c.experts, tile, start), first = p.c.offset_at(e), stop = p.c.offset_at(e + 1);
  const int64_t n = stop > first ? stop - first : 0, stages = (n + kGramStage - 1) / kGramStage;
  // Pieces of an expert are of one size, but for the last. An expert without positions has one, that stores zeros.
  const int64_t wanted = n > chunk ? (n + chunk - 1) / chunk : 1, each = (stages + wanted - 1) / wanted;
  const int64_t pieces = each == 0 ? 1 : (stages + each - 1) / each, i = tile - start(e), begin = i * each;
  const int64_t plane = 2 * first / chunk;
  GramPiece piece{};
  piece.expert = static_cast<int>(e);
  piece.used = static_cast<int>(p.c.used(e));
  piece.stage = static_cast<int>(first / kGramStage + e + begin);
  piece.stages = static_cast<int>(stages - begin < each ? stages - begin : each);
  piece.plane = static_cast<int>(plane + i);
  piece.first = static_cast<int>(plane);
  piece.pieces = static_cast<int>(pieces);
  piece.there = i >= 0 && i < pieces;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) p.pieces[tile] = piece;
  if (i != 0 || pieces == 1) return;
  const int64_t tiles = p.side[0].tiles + int64_t{p.side[1].tiles};
  for (int64_t t = lane; t < tiles; t += kWarp) p.counters[plane * tiles + t] = 0;
}

// v [8]: those of a position. To 2^14 .. 2^15 the largest of each column's 32 in this warp; 1 / power to undo [8].
__device__ __forceinline__ void scale_half(float (&v)[8], float* undo) {
  float powers[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    powers[i] = half_scale(warp_max(fabsf(v[i])));
    v[i] *= powers[i];
  }
  if (threadIdx.x % kWarp != 0) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) undo[i] = 1.0f / powers[i];
}

// A block has a stage, or pieces; a thread a position, and every fourth fragment of ranks.
template <class T, bool kExact>
__global__ void __launch_bounds__(kGramRowsThreads) gram_rows(const GramTiles p) {
  next_may_begin();
  constexpr bool kHalf = std::is_same<T, __half>::value;
  constexpr int kApart = kGramStage / kGramEach;
  const int64_t stage = blockIdx.x;
  if (stage >= p.plan.stages) {
    const int64_t tile = (stage - p.plan.stages) * (kGramRowsThreads / kWarp) + threadIdx.x / kWarp;
    if (tile < p.plan.pieces) put_piece(p, tile);
    return;
  }
  const auto start = [&](int64_t e) { return p.c.offset_at(e) / kGramStage + e; };
  const int64_t e = expert_at(p.c.experts, stage, start), stop = p.c.offset_at(e + 1);
  const int64_t from = p.c.offset_at(e) + (stage - start(e)) * kGramStage;
  const int row = threadIdx.x % kGramStage, part = threadIdx.x / kGramStage;
  const int64_t position = from + row;
  int& token = p.tokens[stage * kApart + row % kApart].row[row / kApart];
  const bool some = stage >= start(e) && from < stop, there = some && position < stop;
  if (!some) {
    if (part == 0) token = -1;
    return;
  }
  const int64_t used = there ? p.c.used(e) : 0;
  const int items = p.side[0].units + p.side[1].units;
  alignas(16) float v[8];
  float dz = 0.0f;
  const auto load = [&](int item) {
    const int which = item < p.side[0].units ? 0 : 1, unit = which == 0 ? item : item - p.side[0].units;
    const GramSide& side = p.side[which];
    const float* const values = static_cast<const float*>(side.values) + position * p.c.rank + 8 * unit;
    const int64_t n = used - 8 * unit;
    if (n >= 8 && side.values_direct) {
      *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(values);
      *reinterpret_cast<float4*>(v + 4) = *reinterpret_cast<const float4*>(values + 4);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = i < n ? values[i] : 0.0f;
    }
  };
  // What does not wait for the order comes first.
  if (part < items) load(part);
  const bool has_dz = p.dz != nullptr && part == kGramRowsThreads / kGramStage - 1;
  if (has_dz && there) dz = static_cast<const float*>(p.dz)[position];
  const int64_t slot = there ? p.c.slot_at(position) : 0;
  if (part == 0) token = there ? static_cast<int>(p.c.token_of(slot)) : -1;
  const float factor = there ? p.c.factor<float>(e, slot) : 0.0f;

  unsigned char* const record = p.records + stage * p.record;
  for (int item = part; item < items; item += kGramRowsThreads / kGramStage) {
    if (item != part) load(item);
    const int which = item < p.side[0].units ? 0 : 1, unit = which == 0 ? item : item - p.side[0].units;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= factor;
    unsigned char* const to = record + p.side[which].first + unit * kGramUnit<T, kExact>;
    if constexpr (kExact && kHalf) scale_half(v, reinterpret_cast<float*>(to + 3 * kGramFragment) + row / kWarp * 8);
#pragma unroll
    for (int term = 0; term < (kExact ? 3 : 1); ++term) {
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bits[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
        const float2 taken = unpack2<T>(bits[i]);
        v[2 * i] -= taken.x;
        v[2 * i + 1] -= taken.y;
      }
      *reinterpret_cast<uint4*>(to + term * kGramFragment + row * 16) = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  }
  if (!has_dz) return;
  if constexpr (kHalf) {
    const float power = half_scale(warp_max(fabsf(dz)));
    dz *= power;
    // Two are read; the second lanes' fill the chunk.
    const int lane = row % kWarp;
    if (lane < 2) reinterpret_cast<float*>(record + kGramFragment)[2 * lane + row / kWarp] = 1.0f / power;
  }
  const float hi = to_acc(from_acc<T>(dz)), mid = to_acc(from_acc<T>(dz - hi));
  *reinterpret_cast<uint4*>(record + row * 16) = make_uint4(pack2<T>(hi, mid), pack2<T>(dz - hi - mid, 0.0f), 0, 0);
}

}  // namespace
}  // namespace moa
