// Gram: dA_e = sum over e's positions p of (s w u[p])^T x[t], dB_e = sum dy[t]^T (s w h[p]), d_router_e = sum dz[p] x[t],
// and the router's dense dW = dz^T x. One kernel:
//
//   G[e][j][c] = sum over p of c[p][j] x[t][c]     c: combine.cuh, [slots, rank]; x [tokens, width], gathered as it is read
//
// written by rows of c (dA) or of j (dB). dz is one more row j = rank, summed in float32 also under 16-bit x.
//
// A block owns a piece of an expert's positions, 64 columns and some ranks, walks the positions in order and keeps its
// sums in registers. Pieces are cut where the position is a multiple of plan.chunk, and numbered so that a block finds its
// own by bisection (plan_cuda.h). An expert in one piece is written at once; the pieces of the others go to planes in the
// accumulator's type, which a second launch adds in order: no atomics, bitwise reproducible.
//
// Experts without positions, and ranks not in use, come out as zeros. Limits: slots < 2^31; any rank, any width.
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
  bool x_direct;   // rows are whole 16-byte chunks
  bool exact;      // coefficients keep float32 under 16-bit x
  const void* dz;  // [slots] or null
  void* out;       // G, or null: element (e, j, c) at e rank width + j out_j + c out_c
  int64_t out_j, out_c;
  bool out_f32;    // float32 under 16-bit x
  void* d_router;  // [experts, width] accumulator type, or null
  void* planes;    // [2 chunks, rank + 1, width] accumulator type; row `rank` is the router's
  plan_cuda::Gram plan;
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

// ---- kernels ----

// Multiply-adds: a thread owns a column and 8 ranks. Positions of a stage are summed apart, then added.
template <class T>
__global__ void __launch_bounds__(kGramThreads, 1) gram_simt(const GramParams p) {
  using A = Acc<T>;
  constexpr int kStage = plan_cuda::kGramSimtStage, kRanks = plan_cuda::kGramSimtRanks;
  constexpr int kEach = kRanks * kGramColumns / kGramThreads;
  MOA_SHARED(A, xs, kStage * kGramColumns);
  MOA_SHARED(A, coef, kStage * kRanks);
  const Piece piece = piece_of(p, blockIdx.z);
  if (!piece.there) return;
  const int64_t j0 = blockIdx.y * static_cast<int64_t>(kRanks), used = p.c.used(piece.expert);
  const int64_t c0 = blockIdx.x * static_cast<int64_t>(kGramColumns);
  const int column = threadIdx.x % kGramColumns, part = threadIdx.x / kGramColumns * kEach;
  const bool router = p.dz != nullptr && p.c.rank < j0 + kRanks;
  const T* const x = static_cast<const T*>(p.x);
  A total[kEach] = {};
  for (int64_t first = piece.begin; first < piece.end && (j0 < used || router); first += kStage) {
    const int count = static_cast<int>(clamp(piece.end - first, 0, kStage));
    __syncthreads();  // all have left the stage of before
    for (int i = threadIdx.x; i < kStage * kGramColumns; i += kGramThreads) {
      const int row = i / kGramColumns;
      const int64_t from = c0 + i % kGramColumns;
      xs[i] = A(0);
      if (row < count && from < p.width) xs[i] = to_acc(x[p.c.token_of(p.c.slot_at(first + row)) * p.ldx + from]);
    }
    for (int i = threadIdx.x; i < kStage * kRanks; i += kGramThreads) {
      const int64_t at = first + i / kRanks, j = j0 + i % kRanks;
      coef[i] = A(0);
      if (i / kRanks >= count) continue;
      if (j < used) {
        coef[i] = p.c.factor<A>(piece.expert, p.c.slot_at(at)) * p.c.value<A>(at, j);
      } else if (j == p.c.rank && p.dz != nullptr) {
        coef[i] = static_cast<const A*>(p.dz)[at];
      }
    }
    __syncthreads();
    A sum[kEach] = {};
    for (int row = 0; row < count; ++row) {
      const A v = xs[row * kGramColumns + column];
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum[i] += coef[row * kRanks + part + i] * v;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) total[i] += sum[i];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) store_sum<T>(p, piece, j0 + part + i, c0 + column, total[i]);
}

// Tensor cores: 16 columns of x are the rows of a product, 8 ranks its columns, positions its depth; a warp has 16 columns
// and all ranks of the block. Both operands lie by positions and are turned by ldmatrix_trans. dz keeps float32: ordinary
// multiply-adds, in the first block of ranks only, two threads a column.
template <class T>
__global__ void __launch_bounds__(kGramThreads, 4) gram_mma(const GramParams p) {
  constexpr int kStage = plan_cuda::kGramStage, kFrags = plan_cuda::kGramRanks / 8;
  static_assert(kStage == 64 && kFrags == 8 && kGramColumns == 64 && kGramThreads == 128, "rows of 8 chunks");
  MOA_SHARED(T, xs, kStage * 64);    // [positions][columns], chunks exchanged
  MOA_SHARED(T, coef, kStage * 64);  // [positions][ranks], the same
  MOA_SHARED(const T*, row, kStage);
  MOA_SHARED(float, factor, kStage);
  MOA_SHARED(float, dz, kStage);
  const Piece piece = piece_of(p, blockIdx.z);
  if (!piece.there) return;
  const int64_t j0 = blockIdx.y * static_cast<int64_t>(8 * kFrags),
                used = p.out == nullptr ? 0 : p.c.used(piece.expert);
  const int64_t c0 = blockIdx.x * static_cast<int64_t>(kGramColumns);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int frags = static_cast<int>(clamp((used - j0 + 7) / 8, 0, kFrags)), pairs = 4 * frags;
  const int column = threadIdx.x % kGramColumns, part = threadIdx.x / kGramColumns * (kStage / 2);
  const bool router = p.dz != nullptr && blockIdx.y == 0;
  const T* const x = static_cast<const T*>(p.x);
  float total[kFrags][4] = {}, share = 0.0f;

  for (int64_t first = piece.begin; first < piece.end && (frags > 0 || router); first += kStage) {
    __syncthreads();  // all have left the stage of before
    if (threadIdx.x < kStage) {
      const int64_t at = first + threadIdx.x;
      const bool here = at < piece.end;
      const int64_t slot = here ? p.c.slot_at(at) : 0;
      row[threadIdx.x] = here ? x + p.c.token_of(slot) * p.ldx : nullptr;
      factor[threadIdx.x] = here ? p.c.factor<float>(piece.expert, slot) : 0.0f;
      dz[threadIdx.x] = here && router ? static_cast<const float*>(p.dz)[at] : 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kStage * 8; i += kGramThreads) {
      const int at = i / 8, chunk = i % 8;
      const int64_t n = row[at] == nullptr ? 0 : p.width - (c0 + 8 * chunk);
      stage_chunk(xs + chunk_at(at, chunk), n > 0 ? row[at] + c0 + 8 * chunk : x, n, p.x_direct);
    }
    cp_async_commit();
    for (int i = threadIdx.x; i < kStage * pairs; i += kGramThreads) {
      const int at = spread(i / pairs), pair = i % pairs;
      const int64_t j = j0 + 2 * pair;
      const auto value = [&](int64_t j) {
        return row[at] == nullptr || j >= used ? 0.0f : factor[at] * p.c.value<float>(first + at, j);
      };
      *reinterpret_cast<uint32_t*>(coef + chunk_at(at, pair / 4) + pair % 4 * 2) = pack2<T>(value(j), value(j + 1));
    }
    cp_async_wait<0>();
    __syncthreads();

    uint32_t a[kStage / 16][4];
#pragma unroll
    for (int step = 0; step < kStage / 16; ++step)
      ldmatrix_x4_trans(a[step], xs + chunk_at(16 * step + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2));
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
      if (f >= frags) continue;
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int step = 0; step < kStage / 16; ++step) {
        uint32_t b[2];
        ldmatrix_x2_trans(b, coef + chunk_at(16 * step + lane % 16, f));
        mma_m16n8k16<T>(sum, a[step], b);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) total[f][i] += sum[i];
    }
    if (router) {
      float sum = 0.0f;
      for (int i = part; i < part + kStage / 2; ++i) sum += dz[i] * to_acc(xs[chunk_at(i, column / 8) + column % 8]);
      share += sum;
    }
  }
#pragma unroll
  for (int f = 0; f < kFrags; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t j = j0 + 8 * f + 2 * (lane % 4) + i % 2;
      if (j < p.c.rank) store_sum<T>(p, piece, j, c0 + 16 * warp + lane / 4 + i / 2 * 8, total[f][i]);
    }
  if (!router) return;
  float* const shares = reinterpret_cast<float*>(coef);
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
  return MOA_LAUNCH((gram_simt<T>), grid, kGramThreads, 0, stream, p);
}
template <class T>
cudaError_t launch_mma(const GramParams& p, cudaStream_t stream) {
  using namespace plan_cuda;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.width, kGramColumns)),
                  static_cast<unsigned>(p.out == nullptr ? 1 : most(1, ceil_div(p.c.rank, kGramRanks))),
                  static_cast<unsigned>(p.plan.pieces));
  return MOA_LAUNCH((gram_mma<T>), grid, kGramThreads, 0, stream, p);
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
    error = p.exact ? launch_simt<T>(p, stream) : launch_mma<T>(p, stream);
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
  p.x_direct = is_half(type) && chunks(x, ldx, 2);
  p.out_j = width;
  p.out_c = 1;
  p.plan = plan_cuda::gram(c.slots, c.experts);
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

size_t router_backward_work(const RouterBackwardParams& r) { return r.d_weight == nullptr ? 0 : work_of(params_of(r)); }
cudaError_t router_backward_cuda(const RouterBackwardParams& r, void* work, cudaStream_t stream) {
  const cudaError_t error = router_dx_cuda(r, stream);
  if (error != cudaSuccess || r.d_weight == nullptr || r.experts == 0) return error;
  return launch(params_of(r), work, stream);
}

}  // namespace moa
