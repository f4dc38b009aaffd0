// Gram: dA_e = sum over e's positions p of (s w u[p])^T x[t], dB_e = sum dy[t]^T (s w h[p]), d_router_e = sum dz[p] x[t],
// and the router's dense dW = dz^T x. One kernel:
//
//   G[e][j][c] = sum over p of c[p][j] x[t][c]     c: combine.cuh, [slots, rank]; x [tokens, width], gathered as it is read
//
// written by rows of c (dA) or of j (dB). dz is one more row j = rank, summed in float32 also under 16-bit x.
//
// A block owns a piece of an expert's positions, 64 columns and some ranks, walks the positions in order and keeps its
// sums in registers. Rows and coefficients come in stages by cp.async: those of the next two are under way while one is
// multiplied, and a row's place is looked up three stages ahead.
//
// Pieces are cut where the position is a multiple of plan.chunk, and numbered so that a block finds its own by bisection
// (plan_cuda.h). An expert in one piece is written at once; the pieces of the others go to planes in the accumulator's
// type, which a second launch adds in order. So every sum has four levels, stage, group, piece and expert, each short:
// float32 keeps 1e-6 of the norm up to hundreds of millions of positions. No atomics, bitwise reproducible.
//
// Experts without positions, and ranks not in use, come out as zeros. Limits: slots < 2^31; any rank, any width.
#include "lora/gram_stream.cuh"

namespace moa {
namespace {

// ---- kernels ----

// Multiply-adds: a thread owns a column and 8 ranks. dz is one more rank.
template <class T>
__global__ void __launch_bounds__(kGramThreads, 1) gram_simt(const GramParams p) {
  using A = Acc<T>;
  constexpr int kStage = plan_cuda::kGramSimtStage, kRanks = plan_cuda::kGramSimtRanks;
  constexpr int kEach = kRanks * kGramColumns / kGramThreads;
  MOA_DYNAMIC_SHARED(A, shared);
  const Piece piece = piece_of(p, blockIdx.z);
  if (!piece.there) return;
  const int64_t j0 = blockIdx.y * static_cast<int64_t>(kRanks), used = p.c.used(piece.expert);
  const int64_t c0 = blockIdx.x * static_cast<int64_t>(kGramColumns);
  const int column = threadIdx.x % kGramColumns, part = threadIdx.x / kGramColumns * kEach;
  const bool router = p.dz != nullptr && p.c.rank < j0 + kRanks;
  A group[kEach] = {}, total[kEach] = {};
  if (j0 < used || router) {
    const SimtStream<T> tile(p, piece, shared, c0, j0, used, router, kRanks / 8);
    tile.run(
        [&](const T* x, const A* coef, const A*, const A*) {
          A sum[kEach] = {};
#pragma unroll 4
          for (int row = 0; row < kStage; ++row) {
            const A v = x[row * kGramColumns + column];
#pragma unroll
            for (int i = 0; i < kEach; ++i) sum[i] += coef[row * kRanks + part + i] * v;
          }
#pragma unroll
          for (int i = 0; i < kEach; ++i) group[i] += sum[i];
        },
        [&] {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            total[i] += group[i];
            group[i] = A(0);
          }
        });
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) store_sum<T>(p, piece, j0 + part + i, c0 + column, total[i]);
}

// Tensor cores: 16 columns of x are the rows of a product, 8 ranks its columns, positions its depth; a warp has 16 columns
// and all ranks of the block. Both operands lie by positions and are turned by ldmatrix_trans. kTerms 3: coefficients keep
// float32, as three terms of T (gram_stream.cuh). dz keeps it too: ordinary multiply-adds, in the first block of ranks
// only, two threads a column.
template <class T, int kTerms>
__global__ void __launch_bounds__(kGramThreads, 3) gram_mma(const GramParams p) {
  using Tile = MmaStream<T, kTerms>;
  constexpr int kStage = plan_cuda::kGramStage, kFrags = plan_cuda::kGramRanks<kTerms> / 8;
  static_assert(kStage == 64 && kGramColumns == 64 && kGramThreads == 128, "rows of 8 chunks");
  MOA_DYNAMIC_SHARED(T, shared);
  const Piece piece = piece_of(p, blockIdx.z);
  if (!piece.there) return;
  const int64_t j0 = blockIdx.y * static_cast<int64_t>(8 * kFrags),
                used = p.out == nullptr ? 0 : p.c.used(piece.expert);
  const int64_t c0 = blockIdx.x * static_cast<int64_t>(kGramColumns);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int frags = static_cast<int>(clamp((used - j0 + 7) / 8, 0, kFrags));
  const int column = threadIdx.x % kGramColumns, part = threadIdx.x / kGramColumns * (kStage / 2);
  const bool router = p.dz != nullptr && blockIdx.y == 0;
  float group[kFrags][4] = {}, total[kFrags][4] = {}, group_share = 0.0f, share = 0.0f;
  if (frags > 0 || router) {
    const Tile tile(p, piece, shared, c0, j0, used, router, p.units);
    tile.run(
        [&](const T* x, const T* coef, const float* dz, const float* unscale) {
          uint32_t a[kStage / 16][4];
#pragma unroll
          for (int step = 0; step < kStage / 16; ++step)
            ldmatrix_x4_trans(a[step], x + chunk_at(16 * step + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2));
#pragma unroll
          for (int f = 0; f < kFrags; ++f) {
            if (f >= frags) continue;
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int step = 0; step < kStage / 16; ++step) {
#pragma unroll
              for (int term = 0; term < kTerms; ++term) {
                uint32_t b[2];
                ldmatrix_x2_trans(b, coef + Tile::coef_at(kTerms * f + term, 16 * step + lane % 16));
                mma_m16n8k16<T>(sum, a[step], b);
              }
              if constexpr (Tile::kScaled) {
                const float* const undo = unscale + (f * (kStage / 16) + step) * 8 + 2 * (lane % 4);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  group[f][i] += sum[i] * undo[i % 2];
                  sum[i] = 0.0f;
                }
              }
            }
            if constexpr (!Tile::kScaled) {
#pragma unroll
              for (int i = 0; i < 4; ++i) group[f][i] += sum[i];
            }
          }
          if (!router) return;
          float sum = 0.0f;
          for (int i = part; i < part + kStage / 2; ++i) sum += dz[i] * to_acc(x[chunk_at(i, column / 8) + column % 8]);
          group_share += sum;
        },
        [&] {
#pragma unroll
          for (int f = 0; f < kFrags; ++f)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              total[f][i] += group[f][i];
              group[f][i] = 0.0f;
            }
          share += group_share;
          group_share = 0.0f;
        });
  }
#pragma unroll
  for (int f = 0; f < kFrags; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t j = j0 + 8 * f + 2 * (lane % 4) + i % 2;
      if (j < p.c.rank) store_sum<T>(p, piece, j, c0 + 16 * warp + lane / 4 + i / 2 * 8, total[f][i]);
    }
  if (!router) return;
  float* const shares = reinterpret_cast<float*>(shared);
  __syncthreads();
  if (part > 0) shares[column] = share;
  __syncthreads();
  if (part == 0) store_sum<T>(p, piece, p.c.rank, c0 + column, share + shares[column]);
}

// A thread an element: the planes of the expert whose first piece is in chunk blockIdx.y, added in order.
template <class T>
__global__ void __launch_bounds__(kGramThreads) gram_finish(const GramParams p) {
  using A = Acc<T>;
  const int64_t size = p.plan.chunk, chunk = blockIdx.y, last = (chunk + 1) * size - 1;
  int64_t lo = 0, hi = p.c.experts;  // the expert of the chunk's last position
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    if (p.c.offset_at(mid) <= last) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  const int64_t first = p.c.offset_at(lo), stop = p.c.offset_at(lo + 1);
  if (first < chunk * size || first > last || stop <= last + 1) return;
  const int64_t plane = (p.c.rank + 1) * p.width, i = blockIdx.x * static_cast<int64_t>(kGramThreads) + threadIdx.x;
  if (i >= (p.c.rank + (p.dz == nullptr ? 0 : 1)) * p.width) return;
  const A* const from = static_cast<const A*>(p.planes) + i;
  A sum = from[(2 * chunk + 1) * plane];
  for (int64_t c = chunk + 1; c <= (stop - 1) / size; ++c) sum += from[2 * c * plane];
  store_place<T>(p, lo, i / p.width, i % p.width, sum);
}

// ---- launchers ----

size_t work_of(const GramParams& p) {
  if (p.plan.chunks <= 1) return 0;
  return static_cast<size_t>(2 * p.plan.chunks * (p.c.rank + 1) * p.width) * (p.type == DType::f64 ? 8 : 4);
}

template <class T>
cudaError_t launch_simt(const GramParams& p, cudaStream_t stream) {
  using namespace plan_cuda;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.width, kGramColumns)),
                  static_cast<unsigned>(ceil_div(p.c.rank + (p.dz == nullptr ? 0 : 1), kGramSimtRanks)),
                  static_cast<unsigned>(p.plan.pieces));
  constexpr size_t kShared = SimtStream<T>::bytes(kGramSimtRanks / 8);
  return MOA_LAUNCH((gram_simt<T>), grid, kGramThreads, kShared, stream, p);
}
template <class T, int kTerms>
cudaError_t launch_mma(GramParams p, cudaStream_t stream) {
  using namespace plan_cuda;
  constexpr int64_t kRanks = kGramRanks<kTerms>;
  const int64_t ranks = p.out == nullptr ? 0 : p.c.rank;
  p.units = static_cast<int>(ceil_div(least(ranks, kRanks), 8));
  const dim3 grid(static_cast<unsigned>(ceil_div(p.width, kGramColumns)),
                  static_cast<unsigned>(most(1, ceil_div(ranks, kRanks))), static_cast<unsigned>(p.plan.pieces));
  const size_t shared = MmaStream<T, kTerms>::bytes(p.units);
  return MOA_LAUNCH((gram_mma<T, kTerms>), grid, kGramThreads, shared, stream, p);
}
template <class T>
cudaError_t launch_finish(const GramParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan_cuda::ceil_div((p.c.rank + 1) * p.width, kGramThreads)),
                  static_cast<unsigned>(p.plan.chunks - 1));
  return MOA_LAUNCH((gram_finish<T>), grid, kGramThreads, 0, stream, p);
}
template <class T>
cudaError_t launch_type(const GramParams& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if constexpr (sizeof(T) == 2) {
    error = p.exact ? launch_mma<T, 3>(p, stream) : launch_mma<T, 1>(p, stream);
  } else {
    error = launch_simt<T>(p, stream);
  }
  if (error != cudaSuccess || p.plan.chunks <= 1) return error;
  return launch_finish<T>(p, stream);
}

cudaError_t launch(GramParams p, void* work, cudaStream_t stream) {
  if (p.width == 0 || p.c.experts == 0) return cudaSuccess;
  p.planes = work;
  switch (p.type) {
    case DType::bf16: return launch_type<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_type<__half>(p, stream);
    case DType::f64: return launch_type<double>(p, stream);
    default: return launch_type<float>(p, stream);
  }
}

GramParams params_of(DType type, const Coefficients& c, const void* x, int64_t ldx, int64_t width) {
  GramParams p{};
  p.type = type;
  p.c = c;
  p.width = width;
  p.x = x;
  p.ldx = ldx;
  const int64_t element = type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
  p.x_direct = chunks(x, ldx, element);
  p.values_direct = chunks(c.values, c.rank, type == DType::f64 ? 8 : 4);
  p.out_j = width;
  p.out_c = 1;
  const bool tensor = is_half(type);
  p.plan = plan_cuda::gram(c.slots, c.experts, tensor ? plan_cuda::kGramStage : plan_cuda::kGramSimtStage);
  return p;
}

// dA and d_router
GramParams params_of_a(const BackwardParams& b) {
  GramParams p = params_of(b.x_type, coefficients_of(b, b.u), b.x, b.ldx, b.in);
  p.dz = b.d_router == nullptr ? nullptr : b.dz;
  p.out = b.dA;
  p.out_f32 = is_half(b.x_type) && b.adapter_type == DType::f32;
  p.d_router = b.d_router;
  return p;
}
GramParams params_of_b(const BackwardParams& b) {
  GramParams p = params_of(b.x_type, coefficients_of(b, b.h), b.dy, b.lddy, b.out);
  p.out = b.dB;
  p.out_j = 1;
  p.out_c = b.rank;
  p.out_f32 = is_half(b.x_type) && b.adapter_type == DType::f32;
  return p;
}
// The router's: one segment of all tokens, whose ranks are the experts.
GramParams params_of(const RouterBackwardParams& r) {
  GramParams p = params_of(r.x_type, coefficients_of(r), r.x, r.ldx, r.in);
  p.exact = true;
  p.out = r.d_weight;
  p.out_f32 = is_half(r.x_type);
  return p;
}

}  // namespace

size_t gram_work(const BackwardParams& b) {
  const size_t a = b.dA == nullptr && b.d_router == nullptr ? 0 : work_of(params_of_a(b));
  const size_t other = b.dB == nullptr ? 0 : work_of(params_of_b(b));
  return a > other ? a : other;
}
cudaError_t gram_cuda(const BackwardParams& b, void* work, cudaStream_t stream) {
  if (b.dA != nullptr || b.d_router != nullptr) {
    const cudaError_t error = launch(params_of_a(b), work, stream);
    if (error != cudaSuccess) return error;
  }
  return b.dB == nullptr ? cudaSuccess : launch(params_of_b(b), work, stream);
}

size_t router_gram_work(const RouterBackwardParams& r) { return work_of(params_of(r)); }
cudaError_t router_gram_cuda(const RouterBackwardParams& r, void* work, cudaStream_t stream) {
  return r.experts == 0 ? cudaSuccess : launch(params_of(r), work, stream);
}

}  // namespace moa
