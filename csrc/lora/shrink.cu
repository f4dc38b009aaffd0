// Shrink: h[p] = A_e x[t], and backward u[p] = dy[t] B_e with dw[slot] = s_e <h[p], u[p]>.
//
//   p = position in the sorted slots, slot = order[p], t = slot / top_k; h, u [tokens top_k, rank]; A [E, rank, in],
//   B [E, out, rank]: one kernel, whose panel lies by rows or by columns (tile.cuh)
//
// A block owns 64 positions of one expert, 16 to 128 ranks and a split of the row's depth. x is gathered as it is read,
// never permuted in memory; on the device a tile finds its expert by bisection of the offsets (plan_cuda.h says how
// tiles are numbered). Positions behind the last expert are one more segment, which is filled with zeros, as are ranks
// that an expert does not use; their rows of A are not read.
//
// Few tiles: splits write planes [split][slots][rank], and a second launch adds them in order. It also makes dw where
// one block does not hold all ranks. No atomics; bitwise reproducible.
//
// k experts a token, few rows of A in all: the dense pass (dense.cu) reads x, or dy, once instead of k times, and the
// second launch takes what was selected from its planes [split][tokens][E * each].
//
// What comes from outside is clamped where it becomes an address: offsets to the slots, order to the tokens, ranks.
// What a routing that is none gives is not specified.
// Limits: rank <= 256, slots < 2^31; any in and out, rows that are not whole 16-byte chunks take element loads.
#include "lora/cuda.h"
#include "lora/dense.cuh"
#include "lora/mma_tile.cuh"
#include "lora/simt_tile.cuh"

namespace moa {
namespace {

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
struct Place {
  Segment s;
  int first, columns;  // of the ranks
  int64_t k0, k1;
  A* out;
  bool dot;

  __device__ __forceinline__ Place(const ShrinkParams& p)
      : s(segment_of(p, blockIdx.x)),
        first(static_cast<int>(blockIdx.y * p.plan.columns)),
        columns(static_cast<int>(clamp(p.rank - first, 0, p.plan.columns))),
        k0(blockIdx.z * p.plan.depth),
        k1(clamp(k0 + p.plan.depth, 0, p.width)),
        out(p.planes == nullptr ? static_cast<A*>(p.out)
                                : static_cast<A*>(p.planes) + static_cast<int64_t>(blockIdx.z) * p.slots * p.rank),
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

// ---- kernels ----

template <class T, int kFrags>
__global__ void __launch_bounds__(plan_cuda::kTileThreads) shrink_mma(const ShrinkParams p) {
  MOA_DYNAMIC_SHARED(T, shared);
  const Place<float> place(p);
  if (place.s.rows == 0) return;
  if (place.s.expert == p.seg.experts) return place.clear(p);
  const auto element = [&](int64_t i) -> const void* {
    if (p.panel_f32) return static_cast<const float*>(p.panel) + i;
    return static_cast<const T*>(p.panel) + i;
  };
  const T* const x = static_cast<const T*>(p.x);
  MmaTile<T, kFrags> tile(panel_of<T>(p, place.s.expert, place.first, place.columns, element), place.k1, p.x_direct,
                          shared, kFrags);
  tile.run(place.k0, x, [&](int m) -> const T* {
    return m < place.s.rows ? x + slot_at(p, place.s.begin + m) / p.seg.top_k * p.ldx : nullptr;
  });
  tile.frags = kFrags;  // what the panel lacks is zero, and is written
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f;
    tile.each_pair(half, [&](int m, int n, float a, float b) {
      if (place.store(p, m, n, a, &sum)) place.store(p, m, n + 1, b, &sum);
    });
    if (!place.dot) continue;
    sum = warp_sum<4>(sum);
    if (lane % 4 == 0) place.store_dot(p, threadIdx.x / kWarp * 16 + lane / 4 + 8 * half, sum);
  }
}

template <class A, int kCols>
__global__ void __launch_bounds__(plan_cuda::kTileThreads) shrink_simt(const ShrinkParams p) {
  using Tile = SimtTile<A, kCols>;
  MOA_SHARED(A, shared, Tile::kElements);
  MOA_SHARED(const A*, rows, Tile::kRows);
  const Place<A> place(p);
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

// plan_cuda::finish_lanes own a position: out = planes added in order, and dw.
template <class A>
__global__ void __launch_bounds__(plan_cuda::kTileThreads) shrink_finish(const ShrinkParams p) {
  const int lanes = plan_cuda::finish_lanes(p.rank), lane = threadIdx.x % lanes;
  const int64_t position = blockIdx.x * static_cast<int64_t>(plan_cuda::kTileThreads / lanes) + threadIdx.x / lanes;
  const bool there = position < p.slots, routed = there && position < offset_at(p, p.seg.experts);
  const int64_t e = routed && (p.each > 0 || p.dw != nullptr) ? expert_at(p, position) : 0;
  const A* from = static_cast<const A*>(p.planes) + position * p.rank;
  int64_t plane = p.slots * p.rank, used = there ? p.rank : 0;
  if (p.each > 0) {
    const int64_t columns = p.seg.experts * p.each, token = routed ? slot_at(p, position) / p.seg.top_k : 0;
    from = static_cast<const A*>(p.planes) + token * columns + e * p.each;
    plane = p.seg.tokens * columns;
    used = !routed ? 0 : p.ranks == nullptr ? p.rank : clamp(p.ranks[e], 0, p.rank);
  }
  A* const out = static_cast<A*>(p.out) + position * p.rank;
  const A* const other = static_cast<const A*>(p.other) + position * p.rank;
  A dot = 0;
  for (int64_t j = lane; there && j < p.rank; j += lanes) {
    A sum = 0;
    if (p.planes == nullptr) {
      sum = out[j];
    } else {
      for (int64_t s = 0; s < p.plan.splits && j < used; ++s) sum += from[s * plane + j];
      out[j] = sum;
    }
    if (p.dw != nullptr) dot += sum * other[j];
  }
  if (p.dw == nullptr) return;
  dot = warp_sum<16>(dot);
  const A more = __shfl_xor_sync(kFullMask, dot, 16);
  if (lanes == 32) dot += more;
  if (lane == 0 && there) static_cast<A*>(p.dw)[slot_at(p, position)] = routed ? scale_of<A>(p, e) * dot : A(0);
}

// ---- launchers ----

int64_t element_size(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
bool is_half(DType type) { return type == DType::bf16 || type == DType::f16; }

ShrinkParams params_of(const LoraParams& l, const void* x, int64_t ldx, int64_t width, const void* panel, bool columns,
                       void* out, void* dw) {
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

size_t work_of(const ShrinkParams& p) {
  return p.plan.splits > 1 ? static_cast<size_t>(p.plan.splits * p.slots * p.rank) * (p.type == DType::f64 ? 8 : 4) : 0;
}

template <class T>
cudaError_t launch_mma(const ShrinkParams& p, dim3 grid, cudaStream_t stream) {
  using namespace plan_cuda;
  if (p.plan.columns == 8 * kNarrow)
    return MOA_LAUNCH((shrink_mma<T, kNarrow>), grid, kTileThreads, tile_shared(kNarrow, kNarrow), stream, p);
  return MOA_LAUNCH((shrink_mma<T, kWide>), grid, kTileThreads, tile_shared(kWide, kWide), stream, p);
}

cudaError_t launch_finish(const ShrinkParams& p, cudaStream_t stream) {
  constexpr int kThreads = plan_cuda::kTileThreads;
  const unsigned blocks =
      static_cast<unsigned>(plan_cuda::ceil_div(p.slots, kThreads / plan_cuda::finish_lanes(p.rank)));
  if (p.type == DType::f64) return MOA_LAUNCH(shrink_finish<double>, blocks, kThreads, 0, stream, p);
  return MOA_LAUNCH(shrink_finish<float>, blocks, kThreads, 0, stream, p);
}

cudaError_t launch(ShrinkParams p, void* work, cudaStream_t stream) {
  if (p.slots == 0 || p.rank == 0) return cudaSuccess;
  p.planes = p.plan.splits > 1 ? work : nullptr;
  const dim3 grid(static_cast<unsigned>(p.plan.tiles), static_cast<unsigned>(p.plan.column_tiles),
                  static_cast<unsigned>(p.plan.splits));
  constexpr int kThreads = plan_cuda::kTileThreads;
  const bool narrow = p.plan.columns == 8 * plan_cuda::kNarrow;
  cudaError_t error = cudaSuccess;
  switch (p.type) {
    case DType::bf16: error = launch_mma<__nv_bfloat16>(p, grid, stream); break;
    case DType::f16: error = launch_mma<__half>(p, grid, stream); break;
    case DType::f64: error = MOA_LAUNCH((shrink_simt<double, 2>), grid, kThreads, 0, stream, p); break;
    case DType::f32:
      error = narrow ? MOA_LAUNCH((shrink_simt<float, 2>), grid, kThreads, 0, stream, p)
                     : MOA_LAUNCH((shrink_simt<float, 8>), grid, kThreads, 0, stream, p);
      break;
  }
  return error != cudaSuccess || !p.plan.finish ? error : launch_finish(p, stream);
}

ShrinkParams params_of(const ForwardParams& f) { return params_of(f, f.x, f.ldx, f.in, f.lora_A, false, f.h, nullptr); }
ShrinkParams params_of(const BackwardParams& b) {
  ShrinkParams p = params_of(b, b.dy, b.lddy, b.out, b.lora_B, true, b.u, b.dw);
  p.other = b.h;
  return p;
}

// The dense pass of a shrink: every expert's product of every token.
DenseParams dense_of(const ShrinkParams& p, DType adapter_type, void* planes) {
  DenseParams d{};
  d.x_type = p.type;
  d.adapter_type = adapter_type;
  d.tokens = p.seg.tokens;
  d.in = p.width;
  d.x = p.x;
  d.ldx = p.ldx;
  d.lora = p.panel;
  d.columns = p.columns ? p.rank : 0;
  d.lora_rows = p.seg.experts * p.each;
  d.planes = planes;
  return d;
}

// out, and dw, from `splits` planes of the dense pass.
cudaError_t pick(ShrinkParams p, const void* planes, int64_t splits, cudaStream_t stream) {
  if (p.slots == 0 || p.rank == 0) return cudaSuccess;
  p.planes = const_cast<void*>(planes);
  p.plan.splits = splits;
  return launch_finish(p, stream);
}

size_t shrink_work(const ShrinkParams& p, DType adapter_type) {
  return p.each > 0 ? planes_size(dense_of(p, adapter_type, nullptr)) : work_of(p);
}

cudaError_t shrink_cuda(const ShrinkParams& p, DType adapter_type, void* work, cudaStream_t stream) {
  if (p.each == 0) return launch(p, work, stream);
  const DenseParams dense = dense_of(p, adapter_type, work);
  const cudaError_t error = dense_cuda(dense, stream);
  return error != cudaSuccess ? error : pick(p, work, plan_of(dense).splits, stream);
}

}  // namespace

size_t shrink_work(const ForwardParams& f) { return shrink_work(params_of(f), f.adapter_type); }
cudaError_t shrink_cuda(const ForwardParams& f, void* work, cudaStream_t stream) {
  return shrink_cuda(params_of(f), f.adapter_type, work, stream);
}

int64_t shrink_planes(const ForwardParams& f) {
  const ShrinkParams p = params_of(f);
  return p.each > 0 ? 1 : p.plan.splits;
}
cudaError_t shrink_planes_cuda(const ForwardParams& f, void* planes, cudaStream_t stream) {
  ShrinkParams p = params_of(f);
  p.plan.finish = false;
  return launch(p, planes, stream);
}

cudaError_t pick_cuda(const ForwardParams& f, const void* all, cudaStream_t stream) {
  ShrinkParams p = params_of(f);
  p.each = p.rank;
  return pick(p, all, 1, stream);
}

size_t backward_shrink_work(const BackwardParams& b) { return shrink_work(params_of(b), b.adapter_type); }
cudaError_t backward_shrink_cuda(const BackwardParams& b, void* work, cudaStream_t stream) {
  return shrink_cuda(params_of(b), b.adapter_type, work, stream);
}

}  // namespace moa
