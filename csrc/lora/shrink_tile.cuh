// What a block of shrink.cu does, and an item of routed.cu: 64 positions of one expert, a tile of columns, a split of the
// depth. Equations: shrink.cu.
#pragma once
#include "lora/cuda.h"
#include "lora/mma_tile.cuh"
#include "lora/simt_tile.cuh"

namespace moa {

struct ShrinkParams {
  DType type;
  Segments seg;
  int64_t slots, width, rank;
  const void* x;  // [tokens, width], rows ldx apart
  int64_t ldx;
  const void* panel;  // A, or B where columns
  bool columns, panel_f32, x_direct, panel_direct;
  const int32_t* ranks;  // or null
  void* out;             // [slots, rank]
  void* planes;          // [splits, slots, rank], or null; or the dense pass's
  int64_t each;          // 0, or the dense pass's columns of an expert
  void* dw;              // [slots] or null
  const void* other;     // [slots, rank], for dw
  const double* scale;   // or null
  double scaling;
  plan_cuda::Shrink plan;
};

// ---- where a block works ----

struct Segment {
  int64_t expert;  // seg.experts: the slots without one
  int64_t begin;   // position of row 0
  int rows;        // 0: nothing to do
};

__device__ __forceinline__ int64_t offset_at(const ShrinkParams& p, int64_t e) {
  return e > p.seg.experts ? p.slots : e == 0 ? 0 : clamp(p.seg.offsets[e], 0, p.slots);
}

__device__ __forceinline__ Segment segment_of(const ShrinkParams& p, int64_t tile) {
  constexpr int kRows = plan_cuda::kTileRows;
  const bool by_slot = p.plan.by_slot;
  // The last e whose first tile is not behind this one. Segment e ends at offset e + 1, the last at the slots' end.
  int64_t lo = 0, hi = p.seg.experts + 1;
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2, at = offset_at(p, mid);
    if ((by_slot ? at : at / kRows + mid) <= tile) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  const int64_t first = offset_at(p, lo), end = offset_at(p, lo + 1);
  const int64_t begin = by_slot ? tile : first + (tile - first / kRows - lo) * kRows;
  const bool starts = !by_slot || (tile - first) % kRows == 0;
  const int64_t left = starts && begin >= first ? end - begin : 0;
  return {lo, begin, static_cast<int>(clamp(left, 0, kRows))};
}

// The expert whose segment holds the position; the last one behind all of them.
__device__ __forceinline__ int64_t expert_at(const ShrinkParams& p, int64_t position) {
  int64_t lo = 0, hi = p.seg.experts;
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    if (offset_at(p, mid) <= position) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

__device__ __forceinline__ int64_t slot_at(const ShrinkParams& p, int64_t position) {
  return clamp(p.seg.order[position], 0, p.slots - 1);
}
template <class A>
__device__ __forceinline__ A scale_of(const ShrinkParams& p, int64_t e) {
  return static_cast<A>(p.scaling * (p.scale == nullptr ? 1.0 : p.scale[e]));
}

template <class T, class F>
__device__ __forceinline__ Panel panel_of(const ShrinkParams& p, int64_t e, int first, int columns, const F& element) {
  const int used = p.ranks == nullptr ? static_cast<int>(p.rank) : static_cast<int>(clamp(p.ranks[e], 0, p.rank));
  Panel panel{};
  panel.ld = p.columns ? p.rank : p.width;
  panel.base = element(e * p.rank * p.width + (p.columns ? first : first * p.width));
  panel.rows = static_cast<int>(clamp(used - first, 0, columns));
  panel.columns = p.columns;
  panel.f32 = p.panel_f32;
  panel.direct = p.panel_direct;
  return panel;
}

// What every block has: its segment, its columns, where it writes.
template <class A>
struct ShrinkPlace {
  Segment s;
  int first, columns;  // of the ranks
  int64_t k0, k1;
  A* out;
  bool dot;

  __device__ __forceinline__ ShrinkPlace(const ShrinkParams& p, int64_t tile, int64_t column_tile, int64_t split)
      : s(segment_of(p, tile)),
        first(static_cast<int>(column_tile * p.plan.columns)),
        columns(static_cast<int>(clamp(p.rank - first, 0, p.plan.columns))),
        k0(split * p.plan.depth),
        k1(clamp(k0 + p.plan.depth, 0, p.width)),
        out(p.planes == nullptr ? static_cast<A*>(p.out) : static_cast<A*>(p.planes) + split * p.slots * p.rank),
        dot(p.dw != nullptr && !p.plan.finish) {}

  // Slots without an expert: zeros.
  __device__ __forceinline__ void clear(const ShrinkParams& p) const {
    for (int i = threadIdx.x; i < s.rows * columns; i += blockDim.x)
      out[(s.begin + i / columns) * p.rank + first + i % columns] = A(0);
    if (!dot) return;
    for (int i = threadIdx.x; i < s.rows; i += blockDim.x) static_cast<A*>(p.dw)[slot_at(p, s.begin + i)] = A(0);
  }
  __device__ __forceinline__ bool store(const ShrinkParams& p, int m, int n, A value, A* sum) const {
    if (m >= s.rows || n >= columns) return false;
    const int64_t at = (s.begin + m) * p.rank + first + n;
    out[at] = value;
    if (dot) *sum += value * static_cast<const A*>(p.other)[at];
    return true;
  }
  __device__ __forceinline__ void store_dot(const ShrinkParams& p, int m, A sum) const {
    if (m < s.rows) static_cast<A*>(p.dw)[slot_at(p, s.begin + m)] = scale_of<A>(p, s.expert) * sum;
  }
};

// ---- blocks ----

// `shared`: Form::kShared bytes.
template <class T, class Form>
__device__ __forceinline__ void shrink_mma_block(const ShrinkParams& p, const ShrinkPlace<float>& place, T* shared) {
  if (place.s.rows == 0) return;
  if (place.s.expert == p.seg.experts) return place.clear(p);
  const auto element = [&](int64_t i) -> const void* {
    if (p.panel_f32) return static_cast<const float*>(p.panel) + i;
    return static_cast<const T*>(p.panel) + i;
  };
  const T* const x = static_cast<const T*>(p.x);
  MmaTile<T, Form> tile;
  tile.template run<false>(panel_of<T>(p, place.s.expert, place.first, place.columns, element), place.k0, place.k1,
                           p.x_direct, shared, x, [&](int m) -> const T* {
                             return m < place.s.rows ? x + slot_at(p, place.s.begin + m) / p.seg.top_k * p.ldx
                                                     : nullptr;
                           });
#pragma unroll
  for (int i = 0; i < 2 * Form::kRowFrags; ++i) {
    const int frag = i / 2, half = i % 2;
    float sum = 0.0f;
    tile.each_pair(frag, half, [&](int m, int n, float a, float b) {
      if (place.store(p, m, n, a, &sum)) place.store(p, m, n + 1, b, &sum);
    });
    if constexpr (Form::kColumns) {
      static_assert(Form::kAcross == 1, "a dot is of one warp's columns");
      if (!place.dot) continue;
      sum = warp_sum<4>(sum);
      if (threadIdx.x % 4 == 0) place.store_dot(p, tile.row(frag, half), sum);
    }
  }
}

// `shared`, `rows`: SimtTile's.
template <class A, int kCols>
__device__ __forceinline__ void shrink_simt_block(const ShrinkParams& p, const ShrinkPlace<A>& place, A* shared,
                                                  const A** rows) {
  using Tile = SimtTile<A, kCols>;
  if (place.s.rows == 0) return;
  if (place.s.expert == p.seg.experts) return place.clear(p);
  const A* const x = static_cast<const A*>(p.x);
  const auto element = [&](int64_t i) -> const void* { return static_cast<const A*>(p.panel) + i; };
  Tile tile(panel_of<A>(p, place.s.expert, place.first, place.columns, element), place.k1, p.x_direct, shared, rows);
  tile.run(place.k0, x, [&](int m) -> const A* {
    return m < place.s.rows ? x + slot_at(p, place.s.begin + m) / p.seg.top_k * p.ldx : nullptr;
  });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = threadIdx.x / 8 + 16 * i;
    A sum = 0;
#pragma unroll
    for (int j = 0; j < kCols; ++j) place.store(p, m, threadIdx.x % 8 + 8 * j, tile.total[i][j], &sum);
    if (!place.dot) continue;
    sum = warp_sum<8>(sum);
    if (threadIdx.x % 8 == 0) place.store_dot(p, m, sum);
  }
}

// ---- on the host ----

inline int64_t element_size(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

inline ShrinkParams shrink_params(const LoraParams& l, const void* x, int64_t ldx, int64_t width, const void* panel,
                                  bool columns, void* out, void* dw) {
  ShrinkParams p{};
  p.type = l.x_type;
  p.seg = l.seg;
  p.slots = l.seg.tokens * l.seg.top_k;
  p.width = width;
  p.rank = l.rank;
  p.x = x;
  p.ldx = ldx;
  p.panel = panel;
  p.columns = columns;
  p.panel_f32 = is_half(l.x_type) && l.adapter_type == DType::f32;
  p.x_direct = chunks(x, ldx, element_size(l.x_type));
  p.panel_direct = chunks(panel, columns ? l.rank : width, element_size(l.x_type)) && !p.panel_f32;
  p.ranks = l.ranks;
  p.out = out;
  p.dw = dw;
  p.scale = l.scale;
  p.scaling = l.scaling;
  p.plan = plan_cuda::shrink(p.slots, l.seg.experts, l.rank, width, l.x_type, dw != nullptr);
  const int64_t each = columns ? plan_cuda::ceil_div(l.rank, 8) * 8 : l.rank;
  const bool dense = plan_cuda::dense_shrink(l.seg.tokens, l.seg.top_k, l.seg.experts, each, is_half(l.x_type));
  p.each = dense ? each : 0;
  return p;
}

}  // namespace moa
