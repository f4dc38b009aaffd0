// Dense: [A_0 .. A_{E-1}; W_r] times the same rows of x; with no A, the router's logits alone.
//
//   h[t][e r + j] = A_e[j] x[t]      logits[t][e] = W_r[e] x[t]      x [tokens, in], A [E r, in], W_r [E, in]
//   u[t][e r + j] = dy[t] B_e[:, j]  backward, r a multiple of 8 (or filled up to one)    B [E, out, r]
//
// A block owns a tile of tokens, a tile of columns and a split of the depth (plan_cuda.h). W_r is float32 and its
// products keep that accuracy under 16-bit x (mma_tile.cuh). Split s writes plane s of h and of the logits; whoever reads
// them adds the planes in order: decode.cu, routed.cu, shrink.cu, or dense_sum below. No atomics; bitwise reproducible.
//
// Limits: any in; rows that are not whole 16-byte chunks take element loads.
#include "lora/cuda.h"
#include "lora/dense.cuh"
#include "lora/mma_tile.cuh"
#include "lora/simt_tile.cuh"

namespace moa {
namespace {

struct DenseLaunch : DenseParams {
  plan_cuda::Dense plan;
  bool x_direct, lora_direct, router_direct, lora_f32;
};

// What every block has: its tokens, its depth, its columns, where they go.
template <class A>
struct DensePlace {
  const DenseLaunch& p;
  int64_t token, k0, k1, lora0, router0;
  int lora, router;  // columns of each kind
  bool of_router;    // a tile of the router alone

  __device__ __forceinline__ DensePlace(const DenseLaunch& p)
      : p(p),
        token(blockIdx.x / static_cast<unsigned>(p.plan.column_tiles) * p.plan.rows),
        k0(blockIdx.y * p.plan.depth),
        k1(clamp(k0 + p.plan.depth, 0, p.in)) {
    const int64_t tile = blockIdx.x % static_cast<unsigned>(p.plan.column_tiles);
    const bool mixed = p.plan.kind == plan_cuda::DenseKind::mixed;
    const int64_t lora_each = 8 * p.plan.lora_frags, router_each = 8 * p.plan.router_frags;
    of_router = !mixed && tile < p.plan.router_tiles;
    lora0 = (mixed ? tile : tile - p.plan.router_tiles) * lora_each;
    router0 = tile * router_each;
    lora = of_router ? 0 : static_cast<int>(clamp(p.lora_rows - lora0, 0, lora_each));
    router = mixed || of_router ? static_cast<int>(clamp(p.experts - router0, 0, router_each)) : 0;
  }

  template <class T>
  __device__ __forceinline__ Panel panel() const {
    Panel panel{};
    if (lora > 0) {
      const int64_t from = p.columns > 0 ? 0 : lora0 * p.in;
      panel.base = p.lora_f32 ? static_cast<const void*>(static_cast<const float*>(p.lora) + from)
                              : static_cast<const T*>(p.lora) + from;
    }
    panel.router = static_cast<const A*>(p.router_weight) + (router > 0 ? router0 * p.in : 0);
    panel.ld = panel.router_ld = p.in;
    if (p.columns > 0) {
      panel.columns = true;
      panel.ld = panel.each = p.columns;
      panel.apart = p.in * p.columns;
      panel.first = lora0 / 8;
    }
    panel.rows = lora;
    panel.f32 = p.lora_f32;
    panel.direct = p.lora_direct;
    panel.router_rows = router;
    panel.router_direct = p.router_direct;
    return panel;
  }
  template <class T>
  __device__ __forceinline__ const T* row(int m) const {
    return token + m < p.tokens ? static_cast<const T*>(p.x) + (token + m) * p.ldx : nullptr;
  }
  template <class T>
  __device__ __forceinline__ const T* some_row(int m) const {
    return static_cast<const T*>(p.x) + (token + m < p.tokens ? token + m : p.tokens - 1) * p.ldx;
  }
  // Column n: of A below `split`, of the router from there on.
  __device__ __forceinline__ A* at(int m, int n, int split) const {
    const int64_t t = token + m;
    const bool of_router = n >= split;
    if (t >= p.tokens || (of_router ? n - split >= router : n >= lora)) return nullptr;
    const int64_t columns = of_router ? p.experts : p.lora_rows, c = of_router ? router0 + n - split : lora0 + n;
    return static_cast<A*>(of_router ? p.logits : p.h) + (blockIdx.y * p.tokens + t) * columns + c;
  }
  __device__ __forceinline__ void store(int m, int n, int split, A value) const {
    A* const to = at(m, n, split);
    if (to != nullptr) *to = value;
  }
};

__device__ __forceinline__ void clear_counters(const DenseLaunch& p) {
  if (p.counters != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < kCounters)
    p.counters[threadIdx.x] = 0;
}

template <class T, class Form>
__device__ __forceinline__ void dense_block(const DenseLaunch& p, const DensePlace<float>& place, T* shared) {
  MmaTile<T, Form> tile;
  tile.template run<true>(place.panel<T>(), place.k0, place.k1, p.x_direct, shared, static_cast<const T*>(p.x),
                          [&](int m) { return place.some_row<T>(m); });
  constexpr int kSplit = 8 * Form::kFrags;
#pragma unroll
  for (int frag = 0; frag < Form::kRowFrags; ++frag)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile.each_pair(frag, half, [&](int m, int n, float a, float b) {
        float* const to = place.at(m, n, kSplit);
        const int64_t columns = n < kSplit ? p.lora_rows : p.experts;
        if (to != nullptr && columns % 2 == 0) {
          *reinterpret_cast<float2*>(to) = make_float2(a, b);
        } else if (to != nullptr) {
          *to = a;
          place.store(m, n + 1, kSplit, b);
        }
      });
    }
}

// Form: of A's tiles; Router: of the router's alone.
template <class T, class Form, class Router>
__global__ void __launch_bounds__(Form::kThreads, blocks_at_once(2, Form::kShared)) dense_mma(const DenseLaunch p) {
  MOA_DYNAMIC_SHARED(T, shared);
  next_may_begin();
  clear_counters(p);
  const DensePlace<float> place(p);
  if constexpr (!std::is_same<Form, Router>::value) {
    if (place.of_router) return dense_block<T, Router>(p, place, shared);
  }
  dense_block<T, Form>(p, place, shared);
}

template <class A, int kCols>
__global__ void __launch_bounds__(plan_cuda::kTileThreads) dense_simt(const DenseLaunch p) {
  using Tile = SimtTile<A, kCols>;
  MOA_SHARED(A, shared, Tile::kElements);
  MOA_SHARED(const A*, rows, Tile::kRows);
  next_may_begin();
  clear_counters(p);
  const DensePlace<A> place(p);
  Tile tile(place.template panel<A>(), place.k1, p.x_direct, shared, rows);
  tile.run(place.k0, static_cast<const A*>(p.x), [&](int m) { return place.template row<A>(m); });
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      place.store(threadIdx.x / 8 + 16 * i, threadIdx.x % 8 + 8 * j, place.lora, tile.total[i][j]);
}

// Sums of `splits` planes of `size` elements; a thread an element.
template <class A>
__global__ void __launch_bounds__(plan_cuda::kTileThreads)
    dense_sum(const A* planes, int64_t splits, int64_t size, A* to) {
  await_launch();
  const int64_t i = blockIdx.x * static_cast<int64_t>(plan_cuda::kTileThreads) + threadIdx.x;
  if (i >= size) return;
  A sum = 0;
#pragma unroll 4
  for (int64_t s = 0; s < splits; ++s) sum += planes[s * size + i];
  to[i] = sum;
}

template <class T, class Form, class Router>
cudaError_t launch_mma(const DenseLaunch& p, dim3 grid, cudaStream_t stream) {
  static_assert(Form::kThreads == Router::kThreads && Form::kRows == Router::kRows, "one grid");
  constexpr size_t kShared = Form::kShared > Router::kShared ? Form::kShared : Router::kShared;
  return MOA_LAUNCH((dense_mma<T, Form, Router>), grid, Form::kThreads, kShared, stream, p);
}
template <class T>
cudaError_t launch_mma(const DenseLaunch& p, dim3 grid, cudaStream_t stream) {
  using namespace plan_cuda;
  if (p.plan.kind == DenseKind::few) return launch_mma<T, FewLoraForm, FewRouterForm>(p, grid, stream);
  if (p.columns > 0) return launch_mma<T, ColumnsForm, ColumnsForm>(p, grid, stream);
  if (p.plan.kind == DenseKind::mixed) return launch_mma<T, MixedForm, MixedForm>(p, grid, stream);
  return launch_mma<T, LoraForm, RouterForm>(p, grid, stream);
}

}  // namespace

plan_cuda::Dense plan_of(const DenseParams& p) {
  return plan_cuda::dense(p.tokens, p.lora_rows, p.experts, p.in, p.x_type);
}

size_t planes_size(const DenseParams& p, int64_t columns) {
  const size_t element = p.x_type == DType::f64 ? 8 : 4;
  return static_cast<size_t>(plan_of(p).splits * p.tokens * columns) * element;
}

cudaError_t dense_cuda(const DenseParams& params, cudaStream_t stream) {
  DenseLaunch p{};
  static_cast<DenseParams&>(p) = params;
  p.plan = plan_of(params);
  if (p.tokens == 0 || p.lora_rows + p.experts == 0) return cudaSuccess;
  const bool half = p.x_type == DType::bf16 || p.x_type == DType::f16;
  const int64_t element = p.x_type == DType::f64 ? 8 : half ? 2 : 4;
  p.lora_f32 = half && p.adapter_type == DType::f32;
  p.x_direct = chunks(p.x, p.ldx, element) && (!half || p.ldx * p.plan.rows < int64_t{1} << 32);

  p.lora_direct = chunks(p.lora, p.columns > 0 ? p.columns : p.in, element) && !p.lora_f32;
  p.router_direct = chunks(p.router_weight, p.in, half ? 4 : element);
  const dim3 grid(static_cast<unsigned>(p.plan.column_tiles * p.plan.row_tiles), static_cast<unsigned>(p.plan.splits));
  const bool narrow = p.plan.kind == plan_cuda::DenseKind::simt_narrow;
  constexpr int kThreads = plan_cuda::kTileThreads;
  switch (p.x_type) {
    case DType::bf16: return launch_mma<__nv_bfloat16>(p, grid, stream);
    case DType::f16: return launch_mma<__half>(p, grid, stream);
    case DType::f64: return MOA_LAUNCH((dense_simt<double, 2>), grid, kThreads, 0, stream, p);
    default:
      return narrow ? MOA_LAUNCH((dense_simt<float, 2>), grid, kThreads, 0, stream, p)
                    : MOA_LAUNCH((dense_simt<float, 8>), grid, kThreads, 0, stream, p);
  }
}

// The same with logits that are one plane whatever the plan: `work` holds the planes of a split sum.
static size_t summed_work(const DenseParams& p) { return plan_of(p).splits > 1 ? planes_size(p, p.experts) : 0; }

static cudaError_t summed_cuda(DenseParams p, void* work, cudaStream_t stream) {
  const int64_t splits = plan_of(p).splits, size = p.tokens * p.experts;
  void* const logits = p.logits;
  if (splits > 1) p.logits = work;
  const cudaError_t error = dense_cuda(p, stream);
  if (error != cudaSuccess || splits == 1) return error;
  constexpr int kThreads = plan_cuda::kTileThreads;
  const unsigned blocks = static_cast<unsigned>(plan_cuda::ceil_div(size, kThreads));
  if (p.x_type == DType::f64)
    return MOA_LAUNCH_EARLY(dense_sum<double>, blocks, kThreads, 0, stream, static_cast<const double*>(work), splits,
                            size, static_cast<double*>(logits));
  return MOA_LAUNCH_EARLY(dense_sum<float>, blocks, kThreads, 0, stream, static_cast<const float*>(work), splits, size,
                          static_cast<float*>(logits));
}

// ---- the router alone ----

static DenseParams params_of(const RouterParams& r) {
  DenseParams p{};
  p.x_type = p.adapter_type = r.x_type;
  p.tokens = r.tokens;
  p.in = r.in;
  p.x = r.x;
  p.ldx = r.ldx;
  p.router_weight = r.weight;
  p.experts = r.experts;
  p.logits = r.logits;
  return p;
}

size_t router_work(const RouterParams& r) { return summed_work(params_of(r)); }

cudaError_t router_cuda(const RouterParams& r, void* work, cudaStream_t stream) {
  return summed_cuda(params_of(r), work, stream);
}

// ---- the router and every expert's A, for a layer that routes its own input ----

static DenseParams params_of(const RoutedShrinkParams& r) {
  DenseParams p{};
  p.x_type = r.x_type;
  p.adapter_type = r.adapter_type;
  p.tokens = r.seg.tokens;
  p.in = r.in;
  p.x = r.x;
  p.ldx = r.ldx;
  p.lora = r.lora_A;
  p.lora_rows = r.seg.experts * r.rank;
  p.router_weight = r.router_weight;
  p.experts = r.seg.experts;
  p.h = r.all;
  p.logits = r.logits;
  return p;
}

int64_t routed_shrink_splits(const ForwardParams& f) {
  RoutedShrinkParams r{};
  static_cast<ForwardParams&>(r) = f;
  return plan_of(params_of(r)).splits;
}

bool routed_shrink_fits(const ForwardParams& r) {
  const bool half = r.x_type == DType::bf16 || r.x_type == DType::f16;
  return plan_cuda::dense_shrink(r.seg.tokens, r.seg.top_k, r.seg.experts, r.rank, half);
}

size_t routed_shrink_all(const RoutedShrinkParams& r) {
  const DenseParams p = params_of(r);
  return planes_size(p, p.lora_rows);
}
size_t routed_shrink_work(const RoutedShrinkParams& r) { return summed_work(params_of(r)); }

cudaError_t routed_shrink_cuda(const RoutedShrinkParams& r, void* work, cudaStream_t stream) {
  return summed_cuda(params_of(r), work, stream);
}

}  // namespace moa
