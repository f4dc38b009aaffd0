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
  bool x_direct, values_direct;  // rows are whole 16-byte chunks
  bool exact;                    // coefficients keep float32 under 16-bit x
  const void* dz;                // [slots] or null
  void* out;                     // G, or null: element (e, j, c) at e rank width + j out_j + c out_c
  int64_t out_j, out_c;
  bool out_f32;    // float32 under 16-bit x
  void* d_router;  // [experts, width] accumulator type, or null
  void* planes;    // [2 chunks, rank + 1, width] accumulator type; row `rank` is the router's
  plan_cuda::Gram plan;
  int shift;  // tensor cores: a row of coefficients takes 2^shift chunks
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

// ---- a piece's positions, stage by stage ----

// A stage is kPositions rows of x (64 columns), the coefficients as they come (raw) and as the product takes them (C: T
// for tensor cores, else the accumulator's type). A thread converts the raw chunks that it has copied itself, so one
// barrier a stage is enough: three buffers of x, of which two are being filled, two of each kind of coefficients.
template <class T, class C, int kPositions>
struct Stream {
  using A = Acc<T>;
  static constexpr int kStages = plan_cuda::kGramStages, kThreads = kGramThreads;
  static constexpr bool kTensor = std::is_same<T, C>::value && sizeof(T) == 2;
  static constexpr int kX = 16 / sizeof(T), kChunks = kGramColumns / kX, kEach = kPositions * kChunks / kThreads;
  static constexpr int kV = 16 / sizeof(A);
  static_assert(kStages == 3 && kPositions <= kThreads && kEach >= 1, "numbering below");

  const GramParams& p;
  const Piece& piece;
  int64_t c0, j0, used;
  bool router;      // dz is wanted here
  int ranks;        // of coefficients in a row of C
  int shift;        // a row of raw is 2^shift chunks
  int chunks_used;  // of which these are needed, whole fragments
  T* xs;            // [kStages][kPositions][64 columns]
  A* raw;           // [2][kPositions][2^shift chunks]
  C* coef;          // [2][kPositions][ranks]
  A *factor, *dz;   // [kStages][kPositions]
  int* token;       // [kStages][kPositions]; -1: none

  static constexpr size_t bytes(int shift, int ranks) {
    return kPositions * (kStages * (kGramColumns * sizeof(T) + 2 * sizeof(A) + sizeof(int)) +
                         2 * ((size_t{16} << shift) + ranks * sizeof(C)));
  }
  __device__ __forceinline__ Stream(const GramParams& p, const Piece& piece, void* shared, int64_t c0, int64_t j0,
                                    int64_t used, bool router, int shift, int ranks)
      : p(p), piece(piece), c0(c0), j0(j0), used(used), router(router), ranks(ranks), shift(shift) {
    chunks_used = kTensor ? 2 * static_cast<int>(clamp((used - j0 + 7) / 8, 0, ranks / 8)) : 1 << shift;
    xs = static_cast<T*>(shared);
    raw = reinterpret_cast<A*>(xs + kStages * kPositions * kGramColumns);
    coef = reinterpret_cast<C*>(raw + (2 * kPositions * kV << shift));
    factor = reinterpret_cast<A*>(coef + 2 * kPositions * ranks);
    dz = factor + kStages * kPositions;
    token = reinterpret_cast<int*>(dz + kStages * kPositions);
  }

  static __device__ __forceinline__ int x_at(int row, int chunk) {
    return kTensor ? chunk_at(row, chunk) : row * kGramColumns + chunk * kX;
  }
  // Chunk i of raw belongs to this row: those that a warp converts together then lie in different banks.
  __device__ __forceinline__ int raw_row(int i) const { return kTensor ? spread(i >> shift) : i >> shift; }

  __device__ __forceinline__ int64_t slot_of(int64_t position) const {
    return position < piece.end ? p.c.slot_at(position) : -1;
  }
  __device__ __forceinline__ A factor_of(int64_t slot) const {
    return slot < 0 ? A(0) : p.c.factor<A>(piece.expert, slot);
  }
  __device__ __forceinline__ A dz_of(int64_t position) const {
    return router && position < piece.end ? static_cast<const A*>(p.dz)[position] : A(0);
  }
  __device__ __forceinline__ int token_of(int64_t slot) const {
    return slot < 0 ? -1 : static_cast<int>(p.c.token_of(slot));
  }

  __device__ __forceinline__ void issue(int buffer, int parity, int64_t first) const {
    const T* const x = static_cast<const T*>(p.x);
    T* const to = xs + buffer * kPositions * kGramColumns;
#pragma unroll
    for (int q = 0; q < kEach; ++q) {
      const int i = q * kThreads + static_cast<int>(threadIdx.x), row = i / kChunks, chunk = i % kChunks;
      const int t = token[buffer * kPositions + row];
      const int64_t at = c0 + kX * chunk, n = t < 0 ? 0 : p.width - at;
      stage_chunk(to + x_at(row, chunk), n > 0 ? x + t * p.ldx + at : x, n, p.x_direct);
    }
    const A* const values = static_cast<const A*>(p.c.values);
    for (int i = threadIdx.x; i < kPositions << shift; i += kThreads) {
      const int chunk = i & ((1 << shift) - 1);
      if (chunk >= chunks_used) continue;
      const int64_t position = first + raw_row(i), j = j0 + kV * chunk, n = position < piece.end ? used - j : 0;
      stage_chunk(raw + (parity * (kPositions << shift) + i) * kV, n > 0 ? values + position * p.c.rank + j : values, n,
                  p.values_direct);
    }
  }

  // The coefficients of a stage, w s v: those of this thread's own copies.
  __device__ __forceinline__ void convert(int buffer, int parity) const {
    for (int i = threadIdx.x; i < kPositions << shift; i += kThreads) {
      const int chunk = i & ((1 << shift) - 1), row = raw_row(i);
      if (chunk >= chunks_used) continue;
      const A f = factor[buffer * kPositions + row];
      alignas(16) A v[kV];
      *reinterpret_cast<uint4*>(v) = *reinterpret_cast<const uint4*>(raw + (parity * (kPositions << shift) + i) * kV);
      C* const to = coef + parity * kPositions * ranks;
      if constexpr (kTensor) {
        *reinterpret_cast<uint2*>(to + chunk_at(row, chunk / 2) + chunk % 2 * 4) =
            make_uint2(pack2<T>(f * v[0], f * v[1]), pack2<T>(f * v[2], f * v[3]));
      } else {
#pragma unroll
        for (int q = 0; q < kV; ++q) {
          const int64_t j = j0 + kV * chunk + q;
          v[q] = j < used ? f * v[q] : router && j == p.c.rank ? dz[buffer * kPositions + row] : A(0);
        }
        *reinterpret_cast<uint4*>(to + row * ranks + kV * chunk) = *reinterpret_cast<const uint4*>(v);
      }
    }
  }

  // stage(x, coefficients, dz) for each stage, fold() whenever a group is full.
  template <class Stage, class Fold>
  __device__ __forceinline__ void run(const Stage& stage, const Fold& fold) const {
    const int64_t steps = (piece.end - piece.begin + kPositions - 1) / kPositions;
    const int row = threadIdx.x;
    const bool looks = row < kPositions;
    // Looked up by one thread a row: where stage s + 3 is, what s + 2 is multiplied with.
    int64_t ahead = -1, position = piece.begin + row;
    A next_factor = 0, next_dz = 0;
    if (looks) {
      const int64_t slot = slot_of(position), second = slot_of(position + kPositions);
      token[row] = token_of(slot);
      token[kPositions + row] = token_of(second);
      factor[row] = factor_of(slot);
      dz[row] = dz_of(position);
      next_factor = factor_of(second);
      next_dz = dz_of(position + kPositions);
      ahead = slot_of(position + 2 * kPositions);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s < steps) issue(s, s, piece.begin + s * kPositions);
      cp_async_commit();
    }
    int buffer = 0, in_group = 0;
    for (int64_t s = 0; s < steps; ++s) {
      const int parity = static_cast<int>(s % 2), next = buffer == 2 ? 0 : buffer + 1, last = next == 2 ? 0 : next + 1;
      cp_async_wait<1>();
      convert(buffer, parity);
      if (looks) {
        factor[next * kPositions + row] = next_factor;
        dz[next * kPositions + row] = next_dz;
        token[last * kPositions + row] = token_of(ahead);
        position += kPositions;
        next_factor = factor_of(ahead);
        next_dz = dz_of(position + kPositions);
        ahead = slot_of(position + 2 * kPositions);
      }
      __syncthreads();  // the stage is there; all have left the one before
      if (s + 2 < steps) issue(last, parity, piece.begin + (s + 2) * kPositions);
      cp_async_commit();
      stage(xs + buffer * kPositions * kGramColumns, coef + parity * kPositions * ranks, dz + buffer * kPositions);
      buffer = next;
      if (++in_group == p.plan.group) {
        fold();
        in_group = 0;
      }
    }
    fold();
    cp_async_wait<0>();
  }
};

template <class T>
using MmaStream = Stream<T, T, plan_cuda::kGramStage>;
template <class T>
using SimtStream = Stream<T, Acc<T>, plan_cuda::kGramSimtStage>;
template <class A>
constexpr int kSimtShift = sizeof(A) == 8 ? 3 : 2;  // 16 ranks
static_assert(plan_cuda::kGramSimtRanks == 16, "kSimtShift");

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
    const SimtStream<T> stream(p, piece, shared, c0, j0, used, router, kSimtShift<A>, kRanks);
    stream.run(
        [&](const T* x, const A* coef, const A*) {
          A sum[kEach] = {};
#pragma unroll 4
          for (int row = 0; row < kStage; ++row) {
            const A v = to_acc(x[row * kGramColumns + column]);
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
// and all ranks of the block. Both operands lie by positions and are turned by ldmatrix_trans. dz keeps float32: ordinary
// multiply-adds, in the first block of ranks only, two threads a column.
template <class T>
__global__ void __launch_bounds__(kGramThreads, 3) gram_mma(const GramParams p) {
  constexpr int kStage = plan_cuda::kGramStage, kFrags = plan_cuda::kGramRanks / 8;
  static_assert(kStage == 64 && kFrags == 8 && kGramColumns == 64 && kGramThreads == 128, "rows of 8 chunks");
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
    const MmaStream<T> stream(p, piece, shared, c0, j0, used, router, p.shift, 8 * kFrags);
    stream.run(
        [&](const T* x, const T* coef, const float* dz) {
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
              uint32_t b[2];
              ldmatrix_x2_trans(b, coef + chunk_at(16 * step + lane % 16, f));
              mma_m16n8k16<T>(sum, a[step], b);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) group[f][i] += sum[i];
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
  constexpr size_t kShared = SimtStream<T>::bytes(kSimtShift<Acc<T>>, kGramSimtRanks);
  return MOA_LAUNCH((gram_simt<T>), grid, kGramThreads, kShared, stream, p);
}
template <class T>
cudaError_t launch_mma(GramParams p, cudaStream_t stream) {
  using namespace plan_cuda;
  while (4 << p.shift < least(p.c.rank, kGramRanks)) ++p.shift;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.width, kGramColumns)),
                  static_cast<unsigned>(p.out == nullptr ? 1 : most(1, ceil_div(p.c.rank, kGramRanks))),
                  static_cast<unsigned>(p.plan.pieces));
  return MOA_LAUNCH((gram_mma<T>), grid, kGramThreads, MmaStream<T>::bytes(p.shift, kGramRanks), stream, p);
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
  const int64_t element = type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
  p.x_direct = chunks(x, ldx, element);
  p.values_direct = chunks(c.values, c.rank, type == DType::f64 ? 8 : 4);
  p.shift = 1;
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

size_t router_backward_work(const RouterBackwardParams& r) { return r.d_weight == nullptr ? 0 : work_of(params_of(r)); }
cudaError_t router_backward_cuda(const RouterBackwardParams& r, void* work, cudaStream_t stream) {
  const cudaError_t error = router_dx_cuda(r, stream);
  if (error != cudaSuccess || r.d_weight == nullptr || r.experts == 0) return error;
  return launch(params_of(r), work, stream);
}

}  // namespace moa
