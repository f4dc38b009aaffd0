// Expand and combine: y[t] = base[t] + bias + sum over the slots of t of w s_e B_e h[p], and backward
// dx[t] = sum s_e w A_e^T u[p] + dz[p] W_r[e]; also the router's dx += dz W.
//
//   p = position in the sorted slots, slot = order[p], t = slot / top_k; h, u [slots, rank]; B [E, out, rank],
//   A [E, rank, in]: one kernel, whose panel is read with two strides
//
// A block owns a tile of tokens and outputs, sums it in shared memory in the accumulator's type and writes it once: no
// atomics, and y may be base. It takes experts in ascending order, so the order of every sum is fixed: results are
// bitwise reproducible. Positions of an expert ascend with their slots, so those of the tile's tokens are one run, which
// bisection finds; a block looks for as many experts at once as it has threads.
//
// A token that names an expert twice has two neighbouring positions: the first takes the sum of both coefficients, so
// that no element of the tile is added to by two threads.
//
// Limits: slots < 2^31; any rank (the router's has E), any width.
#include "lora/positions.cuh"

namespace moa {
namespace {

using plan_cuda::kExpandColumns;
using plan_cuda::kExpandThreads;

struct ExpandParams {
  DType type;
  Coefficients c;
  int64_t tokens, width;
  const void* panel;  // element (e, j, o) at e rank width + j panel_j + o panel_o
  int64_t panel_j, panel_o;
  bool panel_f32, panel_direct;  // float under 16-bit y; rows are whole 16-byte chunks
  const void* dz;                // [slots] or null
  const void* router;            // [experts, width] accumulator type
  const void* base;              // [tokens, width], rows ldbase apart, or null; may be y
  int64_t ldbase;
  const void* bias;  // [width] or null
  void* y;           // [tokens, width]
  bool pairs;        // 16-bit y, base and bias can be taken by two elements
};

// y of the tile: base and bias are added to the sums here and nowhere else.
template <class T, int kLd>
__device__ __forceinline__ void store_tile(const ExpandParams& p, const Acc<T>* tile, int64_t token, int rows,
                                           int64_t o0) {
  using A = Acc<T>;
  const T* const base = static_cast<const T*>(p.base);
  const T* const bias = static_cast<const T*>(p.bias);
  if constexpr (sizeof(T) == 2) {
    const auto add = [](float2 sum, const T* from) {
      const float2 more = unpack2<T>(*reinterpret_cast<const uint32_t*>(from));
      return make_float2(sum.x + more.x, sum.y + more.y);
    };
    for (int i = threadIdx.x; p.pairs && i < rows * kExpandColumns / 2; i += kExpandThreads) {
      const int row = i / (kExpandColumns / 2), column = 2 * (i % (kExpandColumns / 2));
      const int64_t t = token + row, o = o0 + column;
      if (o >= p.width) continue;
      float2 sum = *reinterpret_cast<const float2*>(tile + row * kLd + column);
      if (bias != nullptr) sum = add(sum, bias + o);
      if (base != nullptr) sum = add(sum, base + t * p.ldbase + o);
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + t * p.width + o) = pack2<T>(sum.x, sum.y);
    }
    if (p.pairs) return;
  }
  for (int i = threadIdx.x; i < rows * kExpandColumns; i += kExpandThreads) {
    const int row = i / kExpandColumns, column = i % kExpandColumns;
    const int64_t t = token + row, o = o0 + column;
    if (o >= p.width) continue;
    A sum = tile[row * kLd + column];
    if (bias != nullptr) sum += to_acc(bias[o]);
    if (base != nullptr) sum += to_acc(base[t * p.ldbase + o]);
    static_cast<T*>(p.y)[t * p.width + o] = from_acc<T>(sum);
  }
}

// ---- kernels ----

// Multiply-adds: a thread owns a column and every second position of a group.
template <class T>
__global__ void __launch_bounds__(kExpandThreads) expand_simt(const ExpandParams p) {
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
  store_tile<T, kExpandColumns>(p, tile, token, rows, o0);
}

// Tensor cores: weights are the 16 rows of a product, the expert's tokens its 8 columns, ranks its depth. A warp owns 16
// outputs of the tile, so nobody else adds to what it adds to. Chunks of 16 bytes are exchanged as in mma_tile.cuh.
template <class T>
struct ExpandShared {
  static constexpr int kRows = plan_cuda::kExpandRows, kSize = plan_cuda::kExpandPositions;
  static constexpr int kRanks = plan_cuda::kExpandRanks, kLd = plan_cuda::kExpandLd;
  static_assert(kRanks == 64 && kExpandColumns == 64 && kLd % 2 == 0, "rows of 8 chunks; pairs of sums");
  T panel[64 * 64];        // [outputs][ranks], or [ranks][outputs] where the panel lies so
  T coef[kSize * kRanks];  // [positions][ranks]
  float tile[kRows * kLd];
  Group<float, kSize> group;
  float dz[kSize];
  Runs runs;
};
static_assert(sizeof(ExpandShared<__half>) <= 56 * 1024, "four blocks a multiprocessor");

// `depth` ranks from j0 on, of which those below `used` are read.
template <class T, class S>
__device__ __forceinline__ void stage_panel(const ExpandParams& p, T* to, int64_t e, int64_t o0, int64_t j0, int depth,
                                            int64_t used) {
  const S* const base = static_cast<const S*>(p.panel) + e * p.c.rank * p.width;
  const bool by_rows = p.panel_j == 1;
  const int chunks = by_rows ? depth / 8 : 8, rows = by_rows ? kExpandColumns : depth;
  for (int i = threadIdx.x; i < rows * chunks; i += kExpandThreads) {
    const int row = i / chunks, chunk = i % chunks;
    const int64_t o = o0 + (by_rows ? row : 8 * chunk), j = j0 + (by_rows ? 8 * chunk : row);
    const int64_t n = o >= p.width || j >= used ? 0 : by_rows ? used - j : p.width - o;
    stage_chunk(to + chunk_at(row, chunk), n > 0 ? base + j * p.panel_j + o * p.panel_o : base, n, p.panel_direct);
  }
}

template <class T>
__global__ void __launch_bounds__(kExpandThreads, 4) expand_mma(const ExpandParams p) {
  using Shared = ExpandShared<T>;
  constexpr int kSize = Shared::kSize, kRanks = Shared::kRanks;
  MOA_DYNAMIC_SHARED(Shared, s);
  const int64_t token = blockIdx.x * static_cast<int64_t>(Shared::kRows);
  const int64_t o0 = blockIdx.y * static_cast<int64_t>(kExpandColumns);
  const int rows = static_cast<int>(clamp(p.tokens - token, 0, Shared::kRows));
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = 16 * warp + lane / 4;
  for (int i = threadIdx.x; i < rows * Shared::kLd; i += kExpandThreads) s->tile[i] = 0.0f;

  each_run(p.c, token, rows, &s->runs, [&](int64_t e, int64_t begin, int64_t end) {
    const int64_t used = p.c.used(e);
    float router[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t o = o0 + column + 8 * i;
      if (p.dz != nullptr && o < p.width) router[i] = static_cast<const float*>(p.router)[e * p.width + o];
    }
    for (int64_t first = begin; first < end; first += kSize) {
      const int count = static_cast<int>(clamp(end - first, 0, kSize)), fragments = (count + 7) / 8;
      for (int64_t j0 = 0; j0 == 0 || j0 < used; j0 += kRanks) {
        const int steps = static_cast<int>(clamp((used - j0 + 15) / 16, 0, kRanks / 16)), pairs = 8 * steps;
        __syncthreads();  // all have left the panel and the group of before
        if (p.panel_f32) {
          stage_panel<T, float>(p, s->panel, e, o0, j0, 16 * steps, used);
        } else {
          stage_panel<T, T>(p, s->panel, e, o0, j0, 16 * steps, used);
        }
        if (j0 == 0) s->group.fill(p.c, e, first, count, token, rows);
        __syncthreads();
        for (int i = threadIdx.x; i < 8 * fragments * pairs; i += kExpandThreads) {
          const int at = spread(i / pairs), pair = i % pairs;
          const auto value = [&](int64_t j) {
            return j >= used ? 0.0f : s->group.merged(at, [&](int q) {
              return s->group.factor[q] * p.c.value<float>(first + q, j);
            });
          };
          const uint32_t bits = pack2<T>(value(j0 + 2 * pair), value(j0 + 2 * pair + 1));
          *reinterpret_cast<uint32_t*>(s->coef + chunk_at(at, pair / 4) + pair % 4 * 2) = bits;
        }
        if (threadIdx.x < kSize) {
          const bool here = p.dz != nullptr && j0 == 0;
          s->dz[threadIdx.x] =
              !here ? 0.0f
                    : s->group.merged(threadIdx.x, [&](int q) { return static_cast<const float*>(p.dz)[first + q]; });
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();

        uint32_t w[kRanks / 16][4];
#pragma unroll
        for (int step = 0; step < kRanks / 16; ++step) {
          if (step >= steps) continue;
          if (p.panel_j == 1) {
            ldmatrix_x4(w[step], s->panel + chunk_at(16 * warp + lane % 16, 2 * step + lane / 16));
          } else {
            const int j = 16 * step + lane / 16 * 8 + lane % 8;
            ldmatrix_x4_trans(w[step], s->panel + chunk_at(j, 2 * warp + lane / 8 % 2));
          }
        }
        for (int f = 0; f < fragments; ++f) {
          float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int step = 0; step < kRanks / 16; ++step) {
            if (step >= steps) continue;
            uint32_t b[2];
            ldmatrix_x2(b, s->coef + chunk_at(8 * f + lane % 8, 2 * step + lane / 8 % 2));
            mma_m16n8k16<T>(c, w[step], b);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = 8 * f + 2 * (lane % 4) + i, row = s->group.row[at];
            if (row < 0) continue;
            float* const sum = s->tile + row * Shared::kLd + column;
            sum[0] += c[i] + s->dz[at] * router[0];
            sum[8] += c[2 + i] + s->dz[at] * router[1];
          }
        }
      }
    }
  });
  __syncthreads();
  store_tile<T, Shared::kLd>(p, s->tile, token, rows, o0);
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
cudaError_t launch_mma(const ExpandParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan_cuda::ceil_div(p.tokens, plan_cuda::kExpandRows)),
                  static_cast<unsigned>(plan_cuda::ceil_div(p.width, kExpandColumns)));
  return MOA_LAUNCH((expand_mma<T>), grid, kExpandThreads, sizeof(ExpandShared<T>), stream, p);
}

cudaError_t launch(ExpandParams p, cudaStream_t stream) {
  if (!is_half(p.type)) return launch_simt(p, stream);
  const auto words = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 4 == 0; };
  p.pairs = p.width % 2 == 0 && p.ldbase % 2 == 0 && words(p.y) && words(p.base) && words(p.bias);
  if (p.tokens == 0 || p.width == 0) return cudaSuccess;
  return p.type == DType::bf16 ? launch_mma<__nv_bfloat16>(p, stream) : launch_mma<__half>(p, stream);
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

}  // namespace

size_t expand_work(const ForwardParams&) { return 0; }
cudaError_t expand_cuda(const ForwardParams& f, void*, cudaStream_t stream) {
  ExpandParams p = params_of(f, f.h, f.lora_B, f.out, true, f.y);
  p.base = f.base;
  p.ldbase = f.ldbase;
  p.bias = f.bias;
  return launch(p, stream);
}

size_t backward_expand_work(const BackwardParams&) { return 0; }
cudaError_t backward_expand_cuda(const BackwardParams& b, void*, cudaStream_t stream) {
  if (b.dx == nullptr) return cudaSuccess;
  ExpandParams p = params_of(b, b.u, b.lora_A, b.in, false, b.dx);
  p.dz = b.dz;
  p.router = b.router_weight;
  return launch(p, stream);
}

// In full accuracy for every type: W is of the accumulator's.
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
  p.panel_f32 = is_half(r.x_type);
  p.base = r.dx;
  p.ldbase = r.in;
  p.y = r.dx;
  return launch_simt(p, stream);
}

}  // namespace moa
