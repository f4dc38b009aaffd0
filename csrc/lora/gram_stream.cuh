// What gram.cu walks over: an expert's positions in pieces, and a piece in stages of cp.async. Equations and who owns
// what: there.
#pragma once
#include "lora/combine.cuh"

namespace moa {
namespace {

using plan_cuda::kGramColumns;
using plan_cuda::kGramThreads;

struct GramParams {
  DType type;
  Coefficients c;
  int64_t width;
  const void* x;  // [tokens, width], rows ldx apart
  int64_t ldx;
  bool x_direct, values_direct;  // rows are whole 16-byte chunks
  bool exact;                    // coefficients keep float32 under 16-bit x
  const void* dz;                // [slots] or null
  void* out;                     // G, or null: element (e, j, c) at e rank width + j out_j + c out_c
  int64_t out_j, out_c;
  bool out_f32;    // float32 under 16-bit x
  void* d_router;  // [experts, width] accumulator type, or null
  void* planes;    // [2 chunks, rank + 1, width] accumulator type; row `rank` is the router's
  plan_cuda::Gram plan;
  int units;  // tensor cores: fragments of 8 coefficients that a block has room for
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
  if (p.out_f32) {
    static_cast<float*>(p.out)[at] = static_cast<float>(v);
  } else {
    static_cast<T*>(p.out)[at] = from_acc<T>(v);
  }
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

// A stage is kPositions rows of x (64 columns), the coefficients as they come (raw) and as the product takes them (C: T
// for tensor cores, else the accumulator's type). A thread converts the raw chunks that it has copied itself, so one
// barrier a stage is enough: three buffers of x, of which two are being filled, two of each kind of coefficients.
//
// Tensor cores: a fragment is [positions][8 coefficients], rows of 16 bytes; two threads have a row. kTerms 3 keeps
// float32's accuracy, as mma_tile.cuh does for the router's weights: c = hi + mid + lo, three fragments; in float16 the 16
// coefficients of a warp's positions are scaled by a power of two, which the reader undoes.
template <class T, class C, int kPositions, int kTerms = 1>
struct Stream {
  using A = Acc<T>;
  static constexpr int kStages = plan_cuda::kGramStages, kThreads = kGramThreads;
  static constexpr bool kTensor = sizeof(T) == 2, kScaled = kTerms == 3 && std::is_same<T, __half>::value;
  static constexpr int kX = 16 / sizeof(T), kChunks = kGramColumns / kX, kEach = kPositions * kChunks / kThreads;
  static constexpr int kV = 16 / sizeof(A), kRow = 16 / kV;  // multiply-adds: chunks of 16 coefficients
  static_assert(kStages == 3 && kPositions <= kThreads && kEach >= 1, "numbering below");
  static_assert(!kTensor || 2 * kPositions == kThreads, "two threads have a row of coefficients");

  const GramParams& p;
  const Piece& piece;
  int64_t c0, j0, used;
  bool router;     // dz is wanted here
  int units;       // of 8 coefficients that there is room for
  int frags;       // that are there
  T* xs;           // [kStages][kPositions][64 columns]
  A* raw;          // [2][units][kPositions][8]; multiply-adds: [2][kPositions][8 units]
  C* coef;         // [2][units][kTerms][kPositions][8]; multiply-adds as raw
  A* unscale;      // [2][units][4 warps][8]
  A *factor, *dz;  // [kStages][kPositions]
  int* token;      // [kStages][kPositions]; -1: none

  static constexpr size_t bytes(int units) {
    return kPositions * (kStages * (kGramColumns * sizeof(T) + 2 * sizeof(A) + sizeof(int)) +
                         2 * units * 8 * (sizeof(A) + kTerms * sizeof(C))) +
           (kScaled ? 2 * units * 32 * sizeof(A) : 0);
  }
  __device__ __forceinline__ Stream(const GramParams& p, const Piece& piece, void* shared, int64_t c0, int64_t j0,
                                    int64_t used, bool router, int units)
      : p(p), piece(piece), c0(c0), j0(j0), used(used), router(router), units(units) {
    frags = kTensor ? static_cast<int>(clamp((used - j0 + 7) / 8, 0, units)) : units;
    xs = static_cast<T*>(shared);
    raw = reinterpret_cast<A*>(xs + kStages * kPositions * kGramColumns);
    coef = reinterpret_cast<C*>(raw + 2 * units * kPositions * 8);
    unscale = reinterpret_cast<A*>(coef + 2 * units * kTerms * kPositions * 8);
    factor = unscale + (kScaled ? 2 * units * 32 : 0);
    dz = factor + kStages * kPositions;
    token = reinterpret_cast<int*>(dz + kStages * kPositions);
  }

  static __device__ __forceinline__ int x_at(int row, int chunk) {
    return kTensor ? chunk_at(row, chunk) : row * kGramColumns + chunk * kX;
  }
  static __device__ __forceinline__ int coef_at(int fragment, int row) { return (fragment * kPositions + row) * 8; }

  __device__ __forceinline__ int64_t slot_of(int64_t position) const {
    return position < piece.end ? p.c.slot_at(position) : -1;
  }
  __device__ __forceinline__ A factor_of(int64_t slot) const {
    return slot < 0 ? A(0) : p.c.factor<A>(piece.expert, slot);
  }
  __device__ __forceinline__ A dz_of(int64_t position) const {
    return router && position < piece.end ? static_cast<const A*>(p.dz)[position] : A(0);
  }
  __device__ __forceinline__ int token_of(int64_t slot) const {
    return slot < 0 ? -1 : static_cast<int>(p.c.token_of(slot));
  }

  // This thread's raw chunks: f(index in elements, row, first coefficient).
  template <class F>
  __device__ __forceinline__ void each_chunk(const F& f) const {
    if constexpr (kTensor) {
      for (int fragment = 0; fragment < frags; ++fragment)
        f((fragment * kThreads + static_cast<int>(threadIdx.x)) * kV, static_cast<int>(threadIdx.x / 2),
          8 * fragment + static_cast<int>(threadIdx.x % 2) * kV);
    } else {
      for (int i = threadIdx.x; i < kPositions * kRow; i += kThreads) f(i * kV, i / kRow, i % kRow * kV);
    }
  }

  __device__ __forceinline__ void issue(int buffer, int parity, int64_t first) const {
    const T* const x = static_cast<const T*>(p.x);
    T* const to = xs + buffer * kPositions * kGramColumns;
#pragma unroll
    for (int q = 0; q < kEach; ++q) {
      const int i = q * kThreads + static_cast<int>(threadIdx.x), row = i / kChunks, chunk = i % kChunks;
      const int t = token[buffer * kPositions + row];
      const int64_t at = c0 + kX * chunk, n = t < 0 ? 0 : p.width - at;
      stage_chunk(to + x_at(row, chunk), n > 0 ? x + t * p.ldx + at : x, n, p.x_direct);
    }
    const A* const values = static_cast<const A*>(p.c.values);
    A* const raw_to = raw + parity * units * kPositions * 8;
    each_chunk([&](int i, int row, int j) {
      const int64_t position = first + row, n = position < piece.end ? used - (j0 + j) : 0;
      stage_chunk(raw_to + i, n > 0 ? values + position * p.c.rank + j0 + j : values, n, p.values_direct);
    });
  }

  // The coefficients of a stage, w s v: those of this thread's own copies.
  __device__ __forceinline__ void convert(int buffer, int parity) const {
    const A* const from = raw + parity * units * kPositions * 8;
    C* const to = coef + parity * units * kTerms * kPositions * 8;
    each_chunk([&](int i, int row, int j) {
      const A f = factor[buffer * kPositions + row];
      alignas(16) A v[kV];
      *reinterpret_cast<uint4*>(v) = *reinterpret_cast<const uint4*>(from + i);
#pragma unroll
      for (int q = 0; q < kV; ++q) v[q] *= f;
      if constexpr (kTensor) {
        if constexpr (kScaled) scale(v, row, j, unscale + parity * units * 32);
        store_terms(to + coef_at(kTerms * (j / 8), row) + j % 8, v);
      } else {
#pragma unroll
        for (int q = 0; q < kV; ++q)
          if (router && j0 + j + q == p.c.rank) v[q] = dz[buffer * kPositions + row];
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(v);
      }
    });
  }
  static __device__ __forceinline__ void store_terms(C* to, A (&v)[kV]) {
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const uint2 bits = make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
      *reinterpret_cast<uint2*>(to + term * kPositions * 8) = bits;
      const float2 lo = unpack2<T>(bits.x), hi = unpack2<T>(bits.y);
      v[0] -= lo.x;
      v[1] -= lo.y;
      v[2] -= hi.x;
      v[3] -= hi.y;
    }
  }
  // To 2^14 .. 2^15 the largest of each coefficient's 16 in this warp; a whole warp.
  static __device__ __forceinline__ void scale(A (&v)[kV], int row, int j, A* undo) {
#pragma unroll
    for (int q = 0; q < kV; ++q) {
      A top = fabsf(v[q]);
#pragma unroll
      for (int step = 2; step < kWarp; step *= 2) {
        const A other = __shfl_xor_sync(kFullMask, top, step);
        top = other > top ? other : top;
      }
      const float power = half_scale(top);
      v[q] *= power;
      if (row % 16 == 0) undo[(j / 8 * 4 + row / 16) * 8 + j % 8 + q] = 1.0f / power;
    }
  }

  // stage(x, coefficients, dz, unscale) for each stage, fold() whenever a group is full.
  template <class Stage, class Fold>
  __device__ __forceinline__ void run(const Stage& stage, const Fold& fold) const {
    const int64_t steps = (piece.end - piece.begin + kPositions - 1) / kPositions;
    const int row = threadIdx.x;
    const bool looks = row < kPositions;
    // Looked up by one thread a row: where stage s + 3 is, what s + 2 is multiplied with.
    int64_t ahead = -1, position = piece.begin + row;
    A next_factor = 0, next_dz = 0;
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
      stage(xs + buffer * kPositions * kGramColumns, coef + parity * units * kTerms * kPositions * 8,
            dz + buffer * kPositions, unscale + parity * units * 32);
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

template <class T, int kTerms>
using MmaStream = Stream<T, T, plan_cuda::kGramStage, kTerms>;
template <class T>
using SimtStream = Stream<T, T, plan_cuda::kGramSimtStage>;
static_assert(plan_cuda::kGramSimtRanks == 16, "kRow");

}  // namespace
}  // namespace moa
