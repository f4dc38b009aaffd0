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
// 16-bit types: tensor cores, many tokens in expand_wide.cu, few here (expand_tile.cuh), after a small launch that turns
// the sorted order around (expand_order.cuh). float32 and float64: multiply-adds, here; the same for what does not fit the shared memory of the
// tile (plan_cuda.h), and for their router's dx. There a block sums in shared memory; positions of an expert ascend with
// their slots, so those of the tile's tokens are one run, which bisection finds; a block looks for as many experts at
// once as it has threads.
//
// Limits: slots < 2^31; any rank (the router's has E), any width.
#include "lora/decode.cuh"
#include "lora/dense.cuh"
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
  Place* places;
  int64_t blocks;        // of slots; those behind them are for the router
  const float* router;   // [experts, width]
  __nv_bfloat16* terms;  // [blocks of 8 experts][8 upper, 8 lower][width], or null
  int64_t width;
};

__global__ void __launch_bounds__(plan_cuda::kPlaceThreads) expand_places(const OrderParams p) {
  next_may_begin();
  if (blockIdx.x >= p.blocks) {  // a column of eight experts a thread
    const int64_t i = (blockIdx.x - p.blocks) * plan_cuda::kPlaceThreads + threadIdx.x;
    const int64_t eight = i / p.width, o = i % p.width;
    if (eight * 8 >= p.c.experts) return;
    __nv_bfloat16* const to = p.terms + eight * 16 * p.width + o;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float w = eight * 8 + e < p.c.experts ? p.router[(eight * 8 + e) * p.width + o] : 0.0f;
      const __nv_bfloat16 upper = from_acc<__nv_bfloat16>(w);
      to[e * p.width] = upper;
      to[(e + 8) * p.width] = from_acc<__nv_bfloat16>(w - to_acc(upper));
    }
    return;
  }
  const int64_t position = blockIdx.x * static_cast<int64_t>(plan_cuda::kPlaceThreads) + threadIdx.x;
  if (position >= p.c.slots) return;
  const int64_t slot = p.c.order[position];
  if (slot >= 0 && slot < p.c.slots) p.places[slot] = place_of(p.c, position, slot);
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

size_t work_of(const LoraParams& l, const ExpandParams& p) {
  if (!is_half(l.x_type) || p.tokens == 0 || p.width == 0) return 0;
  const plan_cuda::ExpandWide wide = expand_wide_plan(p);
  if (wide.fits) return expand_wide_work(p, wide);
  const plan_cuda::Expand plan = expand_plan(l, p.width, p.dz != nullptr);
  return plan.fits && !plan.inside ? static_cast<size_t>(p.c.slots) * sizeof(Place) : 0;
}

cudaError_t launch(ExpandParams p, const LoraParams& l, void* work, cudaStream_t stream) {
  if (p.tokens == 0 || p.width == 0) return cudaSuccess;
  const plan_cuda::ExpandWide wide = expand_wide_plan(p);
  if (is_half(l.x_type) && wide.fits) return expand_wide_cuda(p, wide, work, stream);
  const plan_cuda::Expand plan = expand_plan(l, p.width, p.dz != nullptr);
  if (!on_tensor_cores(l, plan)) return launch_simt(p, stream);
  if (!plan.inside) {
    p.places = static_cast<Place*>(work);
    const cudaError_t error = expand_places_cuda(p, nullptr, stream);
    if (error != cudaSuccess) return error;
  }
  prepare(&p, plan);
  return p.type == DType::bf16 ? launch_mma<__nv_bfloat16>(p, plan, stream) : launch_mma<__half>(p, plan, stream);
}

ExpandParams params_of(const ForwardParams& f) { return expand_params(f, f.h); }
ExpandParams params_of(const BackwardParams& b) {
  ExpandParams p = expand_params(b, b.u, b.lora_A, b.in, false, b.dx);
  p.dz = b.dz;
  p.router = b.router_weight;
  return p;
}

}  // namespace

cudaError_t expand_places_cuda(const ExpandParams& p, __nv_bfloat16* terms, cudaStream_t stream) {
  OrderParams o{p.c, const_cast<Place*>(p.places), 0, static_cast<const float*>(p.router), terms, p.width};
  o.blocks = plan_cuda::ceil_div(p.c.slots, plan_cuda::kPlaceThreads);
  const int64_t columns = terms == nullptr ? 0 : plan_cuda::ceil_div(p.c.experts, 8) * p.width;
  const int64_t blocks = o.blocks + plan_cuda::ceil_div(columns, plan_cuda::kPlaceThreads);
  return MOA_LAUNCH(expand_places, static_cast<unsigned>(blocks), plan_cuda::kPlaceThreads, 0, stream, o);
}

size_t expand_work(const ForwardParams& f) { return work_of(f, params_of(f)); }
cudaError_t expand_cuda(const ForwardParams& f, void* work, cudaStream_t stream) {
  return launch(params_of(f), f, work, stream);
}

bool expand_all_fits(const ForwardParams& f) { return expand_wide_plan(expand_params(f, nullptr)).fits; }

// What a mixture's shrink leaves in front of the rest of the work memory, for its expand: h (nothing here, where somebody
// wants it), planes of h while tokens are few, or every expert's products of every token where it has them anyway.
struct Left {
  int64_t planes;
  bool all;
  size_t bytes;
};
static Left left_of(const ForwardParams& f) {
  Left left{f.h == nullptr && expand_all_fits(f) ? shrink_all_planes(f) : 0, true, 0};
  int64_t values = left.planes * f.seg.tokens * f.seg.experts * f.rank;
  if (left.planes == 0) {
    left = {plan_cuda::expand_adds_planes(f.seg.tokens) && f.out > 0 ? shrink_planes(f) : 1, false, 0};
    values = left.planes == 1 && f.h != nullptr ? 0 : left.planes * f.seg.tokens * f.seg.top_k * f.rank;
  }
  left.bytes = static_cast<size_t>(plan_cuda::ceil_div(values * (f.x_type == DType::f64 ? 8 : 4), 256) * 256);
  return left;
}
size_t mixture_work(const ForwardParams& f) {
  const Left left = left_of(f);
  const size_t shrink = left.all || left.planes > 1 ? 0 : shrink_work(f), expand = expand_work(f);
  return left.bytes + (shrink > expand ? shrink : expand);
}
bool mixture_multiplies(const ForwardParams& f) { return f.h == nullptr && skinny_mixture_fits(f, 0); }

// Two launches: planes of h, and everything else.
static cudaError_t multiplied_cuda(const ForwardParams& params, void* work, cudaStream_t stream) {
  if (!mixture_multiplies(params)) return cudaErrorInvalidValue;
  ForwardParams f = params;
  f.h = work;
  const cudaError_t error = shrink_planes_cuda(f, work, stream);
  if (error != cudaSuccess) return error;
  DecodeLaunch p{};
  static_cast<ForwardParams&>(p) = params;
  p.planes = work;
  p.splits = shrink_planes(f);
  p.direct = chunks(f.lora_B, f.rank, 2);
  return skinny_mixture_cuda(p, stream);
}

cudaError_t mixture_cuda(const ForwardParams& params, void* work, cudaStream_t stream) {
  if (params.weight != nullptr) return multiplied_cuda(params, work, stream);
  ForwardParams f = params;
  const Left left = left_of(f);
  void* const rest = static_cast<char*>(work) + left.bytes;
  const bool planes = left.all || left.planes > 1;
  if (planes || f.h == nullptr) f.h = work;
  ExpandParams p = expand_params(f, f.h);
  p.c.planes = left.planes;
  p.c.all = left.all;
  p.sums = planes ? params.h : nullptr;
  const cudaError_t error = left.all ? shrink_all_cuda(f, work, stream)
                            : planes ? shrink_planes_cuda(f, work, stream)
                                     : shrink_cuda(f, rest, stream);
  return error != cudaSuccess ? error : launch(p, f, rest, stream);
}

static ExpandParams params_of(const RoutedShrinkParams& r, const int64_t* ids) {
  ExpandParams p = expand_params(r, r.all);
  p.c.planes = routed_shrink_splits(r);
  p.c.all = true;
  p.ids = ids;
  return p;
}
size_t expand_all_work(const RoutedShrinkParams& r) { return work_of(r, params_of(r, nullptr)); }
cudaError_t expand_all_cuda(const RoutedShrinkParams& r, const int64_t* ids, void* work, cudaStream_t stream) {
  return launch(params_of(r, ids), r, work, stream);
}

size_t backward_expand_work(const BackwardParams& b) { return b.dx == nullptr ? 0 : work_of(b, params_of(b)); }
cudaError_t backward_expand_cuda(const BackwardParams& b, void* work, cudaStream_t stream) {
  return b.dx == nullptr ? cudaSuccess : launch(params_of(b), b, work, stream);
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
