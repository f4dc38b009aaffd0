// Expand and combine: y[t] = base[t] + bias + sum over the slots of t of w s_e B_e h[p], and backward
// dx[t] = sum s_e w A_e^T u[p] + dz[p] W_r[e]; also the router's dx += dz W.
//
//   p = position in the sorted slots, slot = order[p], t = slot / top_k; h, u [slots, rank]; B [E, out, rank],
//   A [E, rank, in]: one kernel, whose panel is read with two strides
//
// A block owns a tile of tokens and outputs, sums it in the accumulator's type and writes it once: no atomics, and y may
// be base. It takes experts in ascending order, so the order of every sum is fixed: results are bitwise reproducible. A
// token that names an expert twice takes the sum of both coefficients.
//
// 16-bit types: tensor cores (expand_tile.cuh), after one or two small launches that turn the sorted order around
// (expand_order.cuh). float32 and float64: multiply-adds, here; the same for what does not fit the shared memory of the
// tile (plan_cuda.h), and for their router's dx. There a block sums in shared memory; positions of an expert ascend with
// their slots, so those of the tile's tokens are one run, which bisection finds; a block looks for as many experts at
// once as it has threads.
//
// Limits: slots < 2^31; any rank (the router's has E), any width.
#include "lora/expand_simt.cuh"
#include "lora/expand_tile.cuh"

namespace moa {
namespace {

using plan_cuda::kExpandColumns;
using plan_cuda::kExpandThreads;

template <class T>
__global__ void __launch_bounds__(kExpandThreads, 1) expand_simt(const ExpandParams p) {
  using Shared = ExpandSimtShared<Acc<T>>;
  MOA_SHARED(Shared, shared, 1);
  expand_simt_block<T>(p, blockIdx.x, blockIdx.y, shared);
  add_planes<Acc<T>>(p, blockIdx.y * gridDim.x + blockIdx.x, int64_t{gridDim.x} * gridDim.y);
}

template <class T, bool kByRows>
__global__ void __launch_bounds__(kExpandThreads, 2) expand_mma(const ExpandParams p) {
  MOA_DYNAMIC_SHARED(unsigned char, shared);
  expand_mma_block<T, kByRows>(p, blockIdx.x, blockIdx.y, shared);
  add_planes<float>(p, blockIdx.y * gridDim.x + blockIdx.x, int64_t{gridDim.x} * gridDim.y);
}

// ---- the order ----

struct OrderParams {
  Coefficients c;
  int64_t tokens;
  Place* places;
  int32_t* rows;
};

__global__ void __launch_bounds__(plan_cuda::kPlaceThreads) expand_places(const OrderParams p) {
  const int64_t position = blockIdx.x * static_cast<int64_t>(plan_cuda::kPlaceThreads) + threadIdx.x;
  if (position >= p.c.slots) return;
  const int64_t slot = p.c.order[position];
  if (slot >= 0 && slot < p.c.slots) p.places[slot] = place_of(p.c, position, slot);
}

// A tile of 128 tokens reads B of every expert that one of them chose: with 64 experts, all 64 of them. Tokens are
// therefore grouped by the pair of experts they chose: pairs (low, high) by stripes of 8 low experts, along high, and in
// it along low. At T = 8192, k = 2, E = 64 there are 4 tokens a pair; 128 rows are then 32 pairs, which 13 experts make
// (drawn at random; 8 and 4, and where a stripe ends more), and 8 rows take 4 experts instead of 14.
//
// Rows of one pair come in any order (atomics place them), which shows nowhere: a token's sum does not depend on its
// neighbours.
//
// A block orders the tokens of a window; a thread has every 1024th.
__global__ void __launch_bounds__(plan_cuda::kClusterThreads) expand_rows(const OrderParams p) {
  constexpr int kSide = plan_cuda::kClusterSide, kBins = kSide * kSide, kThreads = plan_cuda::kClusterThreads;
  constexpr int kEach = kBins / kThreads;
  static_assert(kBins % kThreads == 0 && kThreads == kWarp * kWarp, "a thread's bins; one warp scans the warps' sums");
  static_assert(kSide % 8 == 0 && (kSide & (kSide - 1)) == 0, "whole stripes; masks");
  MOA_SHARED(int, bins, kBins);
  MOA_SHARED(int, sums, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = blockIdx.x * plan_cuda::kClusterWindow;
  const int count = static_cast<int>(clamp(p.tokens - first, 0, plan_cuda::kClusterWindow));
  int shift = 0;
  while ((p.c.experts - 1) >> shift >= kSide) ++shift;
  const auto bin = [&](int t) {
    const Place* const at = p.places + (first + t) * p.c.top_k;
    int a = at[0].expert, b = p.c.top_k > 1 ? at[1].expert : a;
    if (a < 0) a = b;
    if (b < 0) b = a;
    const int low = (a < b ? a : b) >> shift & (kSide - 1), high = (a < b ? b : a) >> shift & (kSide - 1);
    return (low / 8 * kSide + high) * 8 + low % 8;
  };
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < count; t += kThreads) atomicAdd(&bins[bin(t)], 1);
  __syncthreads();

  int own[kEach], total = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    own[i] = bins[threadIdx.x * kEach + i];
    total += own[i];
  }
  const int upto = sum_to_lane(total);
  if (lane == kWarp - 1) sums[warp] = upto;
  __syncthreads();
  if (warp == 0) sums[lane] = sum_to_lane(sums[lane]);
  __syncthreads();
  int start = upto - total + (warp == 0 ? 0 : sums[warp - 1]);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    bins[threadIdx.x * kEach + i] = start;
    start += own[i];
  }
  __syncthreads();
  for (int t = threadIdx.x; t < count; t += kThreads)
    p.rows[first + atomicAdd(&bins[bin(t)], 1)] = static_cast<int32_t>(first + t);
}

// ---- launchers ----

template <class T>
cudaError_t launch_simt(const ExpandParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan_cuda::ceil_div(p.tokens, plan_cuda::kExpandSimtRows)),
                  static_cast<unsigned>(plan_cuda::ceil_div(p.width, kExpandColumns)));
  return MOA_LAUNCH((expand_simt<T>), grid, kExpandThreads, 0, stream, p);
}

cudaError_t launch_simt(const ExpandParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.width == 0) return cudaSuccess;
  switch (p.type) {
    case DType::bf16: return launch_simt<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_simt<__half>(p, stream);
    case DType::f64: return launch_simt<double>(p, stream);
    default: return launch_simt<float>(p, stream);
  }
}

template <class T>
cudaError_t launch_mma(const ExpandParams& p, const plan_cuda::Expand& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts));
  if (p.panel_j == 1) return MOA_LAUNCH((expand_mma<T, true>), grid, kExpandThreads, plan.shared, stream, p);
  return MOA_LAUNCH((expand_mma<T, false>), grid, kExpandThreads, plan.shared, stream, p);
}

// places, rows
size_t work_of(const LoraParams& l, int64_t width, bool router) {
  const plan_cuda::Expand plan = expand_plan(l, width, router);
  if (!on_tensor_cores(l, plan) || plan.inside) return 0;
  const size_t tokens = static_cast<size_t>(l.seg.tokens);
  return tokens * l.seg.top_k * sizeof(Place) + (plan.cluster ? tokens * sizeof(int32_t) : 0);
}

cudaError_t launch(ExpandParams p, const LoraParams& l, void* work, cudaStream_t stream) {
  if (p.tokens == 0 || p.width == 0) return cudaSuccess;
  const plan_cuda::Expand plan = expand_plan(l, p.width, p.dz != nullptr);
  if (!on_tensor_cores(l, plan)) return launch_simt(p, stream);
  cudaError_t error = cudaSuccess;
  if (!plan.inside) {
    p.places = static_cast<Place*>(work);
    const OrderParams o{p.c, p.tokens, static_cast<Place*>(work),
                        reinterpret_cast<int32_t*>(static_cast<Place*>(work) + p.c.slots)};
    const auto places = static_cast<unsigned>(plan_cuda::ceil_div(p.c.slots, plan_cuda::kPlaceThreads));
    error = MOA_LAUNCH(expand_places, places, plan_cuda::kPlaceThreads, 0, stream, o);
    if (error == cudaSuccess && plan.cluster) {
      p.rows = o.rows;
      const auto windows = static_cast<unsigned>(plan_cuda::ceil_div(p.tokens, plan_cuda::kClusterWindow));
      error = MOA_LAUNCH(expand_rows, windows, plan_cuda::kClusterThreads, 0, stream, o);
    }
  }
  if (error != cudaSuccess) return error;
  prepare(&p, plan);
  return p.type == DType::bf16 ? launch_mma<__nv_bfloat16>(p, plan, stream) : launch_mma<__half>(p, plan, stream);
}

}  // namespace

size_t expand_work(const ForwardParams& f) { return work_of(f, f.out, false); }
cudaError_t expand_cuda(const ForwardParams& f, void* work, cudaStream_t stream) {
  return launch(expand_params(f, f.h), f, work, stream);
}

// Work memory: h or its planes (h itself where somebody wants it), and behind them what shrink and then expand work with.
static int64_t mixture_planes(const ForwardParams& f) {
  return plan_cuda::expand_adds_planes(f.seg.tokens) && f.out > 0 ? shrink_planes(f) : 1;
}
static size_t mixture_values(const ForwardParams& f) {
  const int64_t planes = mixture_planes(f);
  const int64_t values = planes == 1 && f.h != nullptr ? 0 : planes * f.seg.tokens * f.seg.top_k * f.rank;
  return static_cast<size_t>(plan_cuda::ceil_div(values * (f.x_type == DType::f64 ? 8 : 4), 256) * 256);
}
size_t mixture_work(const ForwardParams& f) {
  const size_t shrink = mixture_planes(f) > 1 ? 0 : shrink_work(f), expand = expand_work(f);
  return mixture_values(f) + (shrink > expand ? shrink : expand);
}
cudaError_t mixture_cuda(const ForwardParams& params, void* work, cudaStream_t stream) {
  ForwardParams f = params;
  void* const rest = static_cast<char*>(work) + mixture_values(f);
  const int64_t planes = mixture_planes(f);
  if (planes > 1 || f.h == nullptr) f.h = work;
  ExpandParams p = expand_params(f, f.h);
  p.c.planes = planes;
  p.sums = planes > 1 ? params.h : nullptr;
  const cudaError_t error = p.c.planes > 1 ? shrink_planes_cuda(f, work, stream) : shrink_cuda(f, rest, stream);
  return error != cudaSuccess ? error : launch(p, f, rest, stream);
}

size_t backward_expand_work(const BackwardParams& b) { return work_of(b, b.in, b.dz != nullptr); }
cudaError_t backward_expand_cuda(const BackwardParams& b, void* work, cudaStream_t stream) {
  if (b.dx == nullptr) return cudaSuccess;
  ExpandParams p = expand_params(b, b.u, b.lora_A, b.in, false, b.dx);
  p.dz = b.dz;
  p.router = b.router_weight;
  return launch(p, b, work, stream);
}

// float32 and float64; that of 16-bit types is in router_backward.cu.
cudaError_t router_dx_cuda(const RouterBackwardParams& r, cudaStream_t stream) {
  if (r.dx == nullptr) return cudaSuccess;
  ExpandParams p{};
  p.type = r.x_type;
  p.c = coefficients_of(r);
  p.tokens = r.tokens;
  p.width = r.in;
  p.panel = r.weight;
  p.panel_j = r.in;
  p.panel_o = 1;
  p.base = r.dx;
  p.ldbase = r.in;
  p.y = r.dx;
  return launch_simt(p, stream);
}

}  // namespace moa
