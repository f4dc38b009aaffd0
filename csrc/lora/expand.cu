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
#include "lora/expand_tile.cuh"
#include "lora/positions.cuh"

namespace moa {
namespace {

using plan_cuda::kExpandColumns;
using plan_cuda::kExpandThreads;

// Multiply-adds: a thread owns a column and every second position of a group.
template <class T>
__global__ void __launch_bounds__(kExpandThreads, 1) expand_simt(const ExpandParams p) {
  using A = Acc<T>;
  constexpr int kRows = plan_cuda::kExpandSimtRows, kRanks = plan_cuda::kExpandSimtRanks;
  MOA_SHARED(A, tile, kRows * kExpandColumns);
  MOA_SHARED(A, coef, kRows * kRanks);
  using Positions = Group<A, kRows>;
  MOA_SHARED(Positions, group, 1);
  MOA_SHARED(Runs, runs, 1);
  const int64_t token = blockIdx.x * static_cast<int64_t>(kRows),
                o0 = blockIdx.y * static_cast<int64_t>(kExpandColumns);
  const int rows = static_cast<int>(clamp(p.tokens - token, 0, kRows));
  const int column = threadIdx.x % kExpandColumns, part = threadIdx.x / kExpandColumns;
  const int64_t o = o0 + column;
  for (int i = threadIdx.x; i < kRows * kExpandColumns; i += kExpandThreads) tile[i] = A(0);

  each_run(p.c, token, rows, runs, [&](int64_t e, int64_t begin, int64_t end) {
    const int64_t used = p.c.used(e);
    for (int64_t first = begin; first < end; first += kRows) {
      const int count = static_cast<int>(clamp(end - first, 0, kRows));
      // The router's coefficient is one more rank.
      const int64_t depth = used + (p.dz == nullptr ? 0 : 1);
      for (int64_t j0 = 0; j0 < depth; j0 += kRanks) {
        __syncthreads();  // all have left the group of before
        if (j0 == 0) group->fill(p.c, e, first, count, token, rows);
        __syncthreads();
        for (int i = threadIdx.x; i < count * kRanks; i += kExpandThreads) {
          const int64_t j = j0 + i % kRanks;
          coef[i] = j >= depth ? A(0) : group->merged(i / kRanks, [&](int q) {
            return j < used ? group->factor[q] * p.c.value<A>(first + q, j) : static_cast<const A*>(p.dz)[first + q];
          });
        }
        A w[kRanks];
#pragma unroll
        for (int i = 0; i < kRanks; ++i) {
          const int64_t j = j0 + i, from = e * p.c.rank * p.width + j * p.panel_j + o * p.panel_o;
          w[i] = A(0);
          if (o >= p.width || j >= depth) continue;
          if (j >= used) {
            w[i] = static_cast<const A*>(p.router)[e * p.width + o];
          } else if (p.panel_f32) {
            w[i] = static_cast<A>(static_cast<const float*>(p.panel)[from]);
          } else {
            w[i] = to_acc(static_cast<const T*>(p.panel)[from]);
          }
        }
        __syncthreads();
        for (int i = part; i < count; i += kExpandThreads / kExpandColumns) {
          const int row = group->row[i];
          if (row < 0) continue;
          A sum = 0;
#pragma unroll
          for (int j = 0; j < kRanks; ++j) sum += coef[i * kRanks + j] * w[j];
          tile[row * kExpandColumns + column] += sum;
        }
      }
    }
  });
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kExpandColumns; i += kExpandThreads) {
    const int64_t t = token + i / kExpandColumns, at = o0 + i % kExpandColumns;
    if (at >= p.width) continue;
    A sum = tile[i];
    if (p.bias != nullptr) sum += to_acc(static_cast<const T*>(p.bias)[at]);
    if (p.base != nullptr) sum += to_acc(static_cast<const T*>(p.base)[t * p.ldbase + at]);
    static_cast<T*>(p.y)[t * p.width + at] = from_acc<T>(sum);
  }
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

plan_cuda::Expand plan_of(const LoraParams& l, int64_t width, bool router) {
  return plan_cuda::expand(l.seg.tokens, l.seg.top_k, l.seg.experts, l.rank, width, router);
}
bool on_tensor_cores(const LoraParams& l, const plan_cuda::Expand& plan) { return is_half(l.x_type) && plan.fits; }

// places, rows
size_t work_of(const LoraParams& l, int64_t width, bool router) {
  const plan_cuda::Expand plan = plan_of(l, width, router);
  if (!on_tensor_cores(l, plan) || plan.inside) return 0;
  const size_t tokens = static_cast<size_t>(l.seg.tokens);
  return tokens * l.seg.top_k * sizeof(Place) + (plan.cluster ? tokens * sizeof(int32_t) : 0);
}

cudaError_t launch(ExpandParams p, const LoraParams& l, void* work, cudaStream_t stream) {
  if (p.tokens == 0 || p.width == 0) return cudaSuccess;
  const plan_cuda::Expand plan = plan_of(l, p.width, p.dz != nullptr);
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
  const auto fours = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 8 == 0; };
  p.fours = p.width % 4 == 0 && p.ldbase % 4 == 0 && fours(p.y) && fours(p.base) && fours(p.bias);
  p.fragments = static_cast<int>(plan.fragments);
  p.units = plan.units;
  return p.type == DType::bf16 ? launch_mma<__nv_bfloat16>(p, plan, stream) : launch_mma<__half>(p, plan, stream);
}

ExpandParams params_of(const LoraParams& l, const void* values, const void* panel, int64_t width, bool by_rows,
                       void* y) {
  ExpandParams p{};
  p.type = l.x_type;
  p.c = coefficients_of(l, values);
  p.tokens = l.seg.tokens;
  p.width = width;
  p.panel = panel;
  p.panel_j = by_rows ? 1 : width;
  p.panel_o = by_rows ? l.rank : 1;
  p.panel_f32 = is_half(l.x_type) && l.adapter_type == DType::f32;
  p.panel_direct = is_half(l.x_type) && !p.panel_f32 && chunks(panel, by_rows ? l.rank : width, 2);
  p.y = y;
  return p;
}
ExpandParams params_of(const ForwardParams& f, const void* values) {
  ExpandParams p = params_of(f, values, f.lora_B, f.out, true, f.y);
  p.base = f.base;
  p.ldbase = f.ldbase;
  p.bias = f.bias;
  return p;
}

}  // namespace

size_t expand_work(const ForwardParams& f) { return work_of(f, f.out, false); }
cudaError_t expand_cuda(const ForwardParams& f, void* work, cudaStream_t stream) {
  return launch(params_of(f, f.h), f, work, stream);
}

// Work memory: h or its planes, and behind them what shrink and then expand work with.
static int64_t mixture_planes(const ForwardParams& f) {
  return plan_cuda::expand_adds_planes(f.seg.tokens) ? shrink_planes(f) : 1;
}
static size_t mixture_values(const ForwardParams& f) {
  const int64_t values = mixture_planes(f) * f.seg.tokens * f.seg.top_k * f.rank;
  return static_cast<size_t>(plan_cuda::ceil_div(values * (f.x_type == DType::f64 ? 8 : 4), 256) * 256);
}
size_t mixture_work(const ForwardParams& f) {
  const size_t shrink = mixture_planes(f) > 1 ? 0 : shrink_work(f), expand = expand_work(f);
  return mixture_values(f) + (shrink > expand ? shrink : expand);
}
cudaError_t mixture_cuda(const ForwardParams& params, void* work, cudaStream_t stream) {
  ForwardParams f = params;
  f.h = work;
  void* const rest = static_cast<char*>(work) + mixture_values(f);
  ExpandParams p = params_of(f, work);
  p.c.planes = mixture_planes(f);
  const cudaError_t error = p.c.planes > 1 ? shrink_planes_cuda(f, work, stream) : shrink_cuda(f, rest, stream);
  return error != cudaSuccess ? error : launch(p, f, rest, stream);
}

size_t backward_expand_work(const BackwardParams& b) { return work_of(b, b.in, b.dz != nullptr); }
cudaError_t backward_expand_cuda(const BackwardParams& b, void* work, cudaStream_t stream) {
  if (b.dx == nullptr) return cudaSuccess;
  ExpandParams p = params_of(b, b.u, b.lora_A, b.in, false, b.dx);
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
