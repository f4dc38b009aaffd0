// What gram.cu's multiply-adds walk over: an expert's positions in pieces, and a piece in stages of cp.async. Equations
// and who owns what: there.
#pragma once
#include "lora/combine.cuh"

namespace moa {
namespace {

using plan_cuda::kGramSimtColumns;
using plan_cuda::kGramSimtRanks;
using plan_cuda::kGramSimtThreads;

struct GramParams {
  DType type;
  Coefficients c;
  int64_t width;
  const void* x;  // [tokens, width], rows ldx apart
  int64_t ldx;
  bool x_direct, values_direct;  // rows are whole 16-byte chunks
  const void* dz;                // [slots] or null
  void* out;                     // G, or null: element (e, j, c) at e rank width + j out_j + c out_c
  int64_t out_j, out_c;
  void* d_router;  // [experts, width] accumulator type, or null
  void* planes;    // [2 chunks, rank + 1, width] accumulator type; row `rank` is the router's
  plan_cuda::Gram plan;
};

// ---- which positions a block takes ----

struct Piece {
  int64_t expert, begin, end;
  int64_t plane;  // -1: all of the expert, written to its place
  bool there;
};

__device__ __forceinline__ Piece piece_of(const GramParams& p, int64_t tile) {
  const int64_t size = p.plan.chunk;
  int64_t lo = 0, hi = p.c.experts;
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    if (p.c.offset_at(mid) / size + mid <= tile) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  const int64_t first = p.c.offset_at(lo), stop = p.c.offset_at(lo + 1);
  const int64_t index = tile - first / size - lo, chunk = first / size + index;
  Piece piece{lo, chunk * size, (chunk + 1) * size, -1, index >= 0};
  if (piece.begin < first) piece.begin = first;
  if (piece.end > stop) piece.end = stop;
  if (index > 0 && piece.begin >= piece.end) piece.there = false;  // every expert has one tile, if it is empty too
  // Of the experts in several pieces, one at most begins in a chunk, and one at most comes into it from before.
  if (stop > first && (stop - 1) / size > first / size) piece.plane = 2 * chunk + (index == 0 ? 1 : 0);
  return piece;
}

template <class T>
__device__ __forceinline__ void store_place(const GramParams& p, int64_t e, int64_t j, int64_t column, Acc<T> v) {
  if (j == p.c.rank) {
    if (p.d_router != nullptr) static_cast<Acc<T>*>(p.d_router)[e * p.width + column] = v;
    return;
  }
  if (p.out == nullptr) return;
  if (j >= p.c.used(e)) v = Acc<T>(0);
  const int64_t at = e * p.c.rank * p.width + j * p.out_j + column * p.out_c;
  static_cast<T*>(p.out)[at] = v;
}
template <class T>
__device__ __forceinline__ void store_sum(const GramParams& p, const Piece& piece, int64_t j, int64_t column,
                                          Acc<T> v) {
  if (column >= p.width || j > p.c.rank || (j == p.c.rank && p.dz == nullptr)) return;
  if (piece.plane < 0) {
    store_place<T>(p, piece.expert, j, column, v);
  } else {
    static_cast<Acc<T>*>(p.planes)[(piece.plane * (p.c.rank + 1) + j) * p.width + column] = v;
  }
}

// ---- a piece's positions, stage by stage ----

// A stage is 16 rows of x (64 columns) and their coefficients, as they come (raw) and as they are multiplied. A thread
// converts the raw chunks that it has copied itself, so one barrier a stage is enough: three buffers of x, of which two
// are being filled, two of each kind of coefficients.
template <class T>
struct SimtStream {
  static constexpr int kStages = plan_cuda::kGramSimtStages, kThreads = kGramSimtThreads;
  static constexpr int kPositions = plan_cuda::kGramSimtStage, kRanks = kGramSimtRanks;
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kGramSimtColumns / kChunk;
  static constexpr int kEach = kPositions * kChunks / kThreads, kRow = kRanks / kChunk;
  static_assert(kStages == 3 && kPositions <= kThreads && kEach >= 1, "numbering below");

  const GramParams& p;
  const Piece& piece;
  int64_t c0, j0, used;
  bool router;     // dz is wanted here
  T* xs;           // [kStages][kPositions][64 columns]
  T* raw;          // [2][kPositions][kRanks]
  T* coef;         // the same
  T *factor, *dz;  // [kStages][kPositions]
  int* token;      // [kStages][kPositions]; -1: none

  static constexpr size_t kBytes =
      kPositions * (kStages * ((kGramSimtColumns + 2) * sizeof(T) + sizeof(int)) + 4 * kRanks * sizeof(T));
  __device__ __forceinline__ SimtStream(const GramParams& p, const Piece& piece, T* shared, int64_t c0, int64_t j0,
                                        int64_t used, bool router)
      : p(p), piece(piece), c0(c0), j0(j0), used(used), router(router) {
    xs = shared;
    raw = xs + kStages * kPositions * kGramSimtColumns;
    coef = raw + 2 * kPositions * kRanks;
    factor = coef + 2 * kPositions * kRanks;
    dz = factor + kStages * kPositions;
    token = reinterpret_cast<int*>(dz + kStages * kPositions);
  }

  __device__ __forceinline__ int64_t slot_of(int64_t position) const {
    return position < piece.end ? p.c.slot_at(position) : -1;
  }
  __device__ __forceinline__ T factor_of(int64_t slot) const {
    return slot < 0 ? T(0) : p.c.factor<T>(piece.expert, slot);
  }
  __device__ __forceinline__ T dz_of(int64_t position) const {
    return router && position < piece.end ? static_cast<const T*>(p.dz)[position] : T(0);
  }
  __device__ __forceinline__ int token_of(int64_t slot) const {
    return slot < 0 ? -1 : static_cast<int>(p.c.token_of(slot));
  }

  // This thread's raw chunks: f(index in elements, row, first coefficient).
  template <class F>
  __device__ __forceinline__ void each_chunk(const F& f) const {
    for (int i = threadIdx.x; i < kPositions * kRow; i += kThreads) f(i * kChunk, i / kRow, i % kRow * kChunk);
  }

  __device__ __forceinline__ void issue(int buffer, int parity, int64_t first) const {
    const T* const x = static_cast<const T*>(p.x);
    T* const to = xs + buffer * kPositions * kGramSimtColumns;
#pragma unroll
    for (int q = 0; q < kEach; ++q) {
      const int i = q * kThreads + static_cast<int>(threadIdx.x), row = i / kChunks, chunk = i % kChunks;
      const int t = token[buffer * kPositions + row];
      const int64_t at = c0 + kChunk * chunk, n = t < 0 ? 0 : p.width - at;
      stage_chunk(to + row * kGramSimtColumns + chunk * kChunk, n > 0 ? x + t * p.ldx + at : x, n, p.x_direct);
    }
    const T* const values = static_cast<const T*>(p.c.values);
    T* const raw_to = raw + parity * kPositions * kRanks;
    each_chunk([&](int i, int row, int j) {
      const int64_t position = first + row, n = position < piece.end ? used - (j0 + j) : 0;
      stage_chunk(raw_to + i, n > 0 ? values + position * p.c.rank + j0 + j : values, n, p.values_direct);
    });
  }

  // The coefficients of a stage, w s v: those of this thread's own copies.
  __device__ __forceinline__ void convert(int buffer, int parity) const {
    const T* const from = raw + parity * kPositions * kRanks;
    T* const to = coef + parity * kPositions * kRanks;
    each_chunk([&](int i, int row, int j) {
      const T f = factor[buffer * kPositions + row];
      alignas(16) T v[kChunk];
      *reinterpret_cast<uint4*>(v) = *reinterpret_cast<const uint4*>(from + i);
#pragma unroll
      for (int q = 0; q < kChunk; ++q) {
        v[q] *= f;
        if (router && j0 + j + q == p.c.rank) v[q] = dz[buffer * kPositions + row];
      }
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(v);
    });
  }

  // stage(x, coefficients) for each stage, fold() whenever a group is full.
  template <class Stage, class Fold>
  __device__ __forceinline__ void run(const Stage& stage, const Fold& fold) const {
    const int64_t steps = (piece.end - piece.begin + kPositions - 1) / kPositions;
    const int row = threadIdx.x;
    const bool looks = row < kPositions;
    // Looked up by one thread a row: where stage s + 3 is, what s + 2 is multiplied with.
    int64_t ahead = -1, position = piece.begin + row;
    T next_factor = 0, next_dz = 0;
    if (looks) {
      const int64_t slot = slot_of(position), second = slot_of(position + kPositions);
      token[row] = token_of(slot);
      token[kPositions + row] = token_of(second);
      factor[row] = factor_of(slot);
      dz[row] = dz_of(position);
      next_factor = factor_of(second);
      next_dz = dz_of(position + kPositions);
      ahead = slot_of(position + 2 * kPositions);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s < steps) issue(s, s, piece.begin + s * kPositions);
      cp_async_commit();
    }
    int buffer = 0, in_group = 0;
    for (int64_t s = 0; s < steps; ++s) {
      const int parity = static_cast<int>(s % 2), next = buffer == 2 ? 0 : buffer + 1, last = next == 2 ? 0 : next + 1;
      cp_async_wait<1>();
      convert(buffer, parity);
      if (looks) {
        factor[next * kPositions + row] = next_factor;
        dz[next * kPositions + row] = next_dz;
        token[last * kPositions + row] = token_of(ahead);
        position += kPositions;
        next_factor = factor_of(ahead);
        next_dz = dz_of(position + kPositions);
        ahead = slot_of(position + 2 * kPositions);
      }
      __syncthreads();  // the stage is there; all have left the one before
      if (s + 2 < steps) issue(last, parity, piece.begin + (s + 2) * kPositions);
      cp_async_commit();
      stage(xs + buffer * kPositions * kGramSimtColumns, coef + parity * kPositions * kRanks);
      buffer = next;
      if (++in_group == p.plan.group) {
        fold();
        in_group = 0;
      }
    }
    fold();
    cp_async_wait<0>();
  }
};

}  // namespace
}  // namespace moa
