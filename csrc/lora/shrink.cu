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
#include "lora/shrink_tile.cuh"

namespace moa {
namespace {

// ---- kernels ----

template <class T, int kFrags, bool kColumns>
__global__ void __launch_bounds__(plan_cuda::kTileThreads) shrink_mma(const ShrinkParams p) {
  MOA_DYNAMIC_SHARED(T, shared);
  next_may_begin();
  shrink_mma_block<T, plan_cuda::GroupedForm<kFrags, kColumns>>(p, {p, blockIdx.x, blockIdx.y, blockIdx.z}, shared);
}

template <class A, int kCols>
__global__ void __launch_bounds__(plan_cuda::kTileThreads) shrink_simt(const ShrinkParams p) {
  using Tile = SimtTile<A, kCols>;
  MOA_SHARED(A, shared, Tile::kElements);
  MOA_SHARED(const A*, rows, Tile::kRows);
  next_may_begin();
  shrink_simt_block<A, kCols>(p, {p, blockIdx.x, blockIdx.y, blockIdx.z}, shared, rows);
}

// plan_cuda::finish_lanes own a position: out = planes added in order, and dw.
template <class A>
__global__ void __launch_bounds__(plan_cuda::kTileThreads) shrink_finish(const ShrinkParams p) {
  await_launch();
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

size_t work_of(const ShrinkParams& p) {
  return p.plan.splits > 1 ? static_cast<size_t>(p.plan.splits * p.slots * p.rank) * (p.type == DType::f64 ? 8 : 4) : 0;
}

template <class T, int kFrags, bool kColumns>
cudaError_t launch_mma(const ShrinkParams& p, dim3 grid, cudaStream_t stream) {
  return MOA_LAUNCH((shrink_mma<T, kFrags, kColumns>), grid, plan_cuda::kTileThreads,
                    (plan_cuda::GroupedForm<kFrags, kColumns>::kShared), stream, p);
}
template <class T, bool kColumns>
cudaError_t launch_mma(const ShrinkParams& p, dim3 grid, cudaStream_t stream) {
  using namespace plan_cuda;
  if (p.plan.columns == 8 * kNarrow) return launch_mma<T, kNarrow, kColumns>(p, grid, stream);
  if (p.plan.columns == 8 * kMiddle) return launch_mma<T, kMiddle, kColumns>(p, grid, stream);
  return launch_mma<T, kWide, kColumns>(p, grid, stream);
}
template <class T>
cudaError_t launch_mma(const ShrinkParams& p, dim3 grid, cudaStream_t stream) {
  return p.columns ? launch_mma<T, true>(p, grid, stream) : launch_mma<T, false>(p, grid, stream);
}

cudaError_t launch_finish(const ShrinkParams& p, cudaStream_t stream) {
  constexpr int kThreads = plan_cuda::kTileThreads;
  const unsigned blocks =
      static_cast<unsigned>(plan_cuda::ceil_div(p.slots, kThreads / plan_cuda::finish_lanes(p.rank)));
  if (p.type == DType::f64) return MOA_LAUNCH_EARLY(shrink_finish<double>, blocks, kThreads, 0, stream, p);
  return MOA_LAUNCH_EARLY(shrink_finish<float>, blocks, kThreads, 0, stream, p);
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

ShrinkParams params_of(const ForwardParams& f) {
  return shrink_params(f, f.x, f.ldx, f.in, f.lora_A, false, f.h, nullptr);
}
ShrinkParams params_of(const BackwardParams& b) {
  ShrinkParams p = shrink_params(b, b.dy, b.lddy, b.out, b.lora_B, true, b.u, b.dw);
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
  d.h = planes;
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
  return p.each > 0 ? planes_size(dense_of(p, adapter_type, nullptr), p.seg.experts * p.each) : work_of(p);
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

int64_t shrink_all_planes(const ForwardParams& f) {
  const ShrinkParams p = params_of(f);
  return p.each > 0 ? plan_of(dense_of(p, f.adapter_type, nullptr)).splits : 0;
}
cudaError_t shrink_all_cuda(const ForwardParams& f, void* planes, cudaStream_t stream) {
  return dense_cuda(dense_of(params_of(f), f.adapter_type, planes), stream);
}

cudaError_t pick_cuda(const ForwardParams& f, const void* all, cudaStream_t stream) {
  ShrinkParams p = params_of(f);
  p.each = p.rank;
  return pick(p, all, routed_shrink_splits(f), stream);
}

size_t backward_shrink_work(const BackwardParams& b) { return shrink_work(params_of(b), b.adapter_type); }
cudaError_t backward_shrink_cuda(const BackwardParams& b, void* work, cudaStream_t stream) {
  return shrink_cuda(params_of(b), b.adapter_type, work, stream);
}

}  // namespace moa
