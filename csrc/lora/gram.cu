// Gram: dA_e = sum over e's positions p of (s w u[p])^T x[t], dB_e = sum dy[t]^T (s w h[p]), d_router_e = sum dz[p]
// x[t], and the router's dense dW = dz^T x. One product:
//
//   G[e][j][c] = sum over p of c[p][j] x[t][c]     c: combine.cuh, [slots, rank]; x [tokens, width], gathered
//
// written by rows of c (dA) or of j (dB). dz is one more row, summed in float32 also under 16-bit x.
//
//   16-bit x            gram_rows.cuh makes what the tiles read, gram_tile.cuh multiplies on tensor cores: two launches
//                       for dA, dB and d_router together
//   float32, float64    here: gram_simt by multiply-adds, and gram_finish where experts are in several pieces
//
// A block owns a piece of an expert's positions, some columns and some ranks, walks the positions in order and keeps
// its sums in registers, while the rows of later stages are under way by cp.async. An expert in one piece is written at
// once; the pieces of the others go to planes in the accumulator's type, which are added in order. So every sum has
// four levels, stage, group, piece and expert, each short: float32 keeps 1e-6 of the norm up to hundreds of millions of
// positions. No atomics on sums, bitwise reproducible.
//
// Experts without positions, and ranks not in use, come out as zeros. Limits: slots < 2^31; any rank, any width.
#include "lora/gram_stream.cuh"
#include "lora/gram_tile.cuh"

namespace moa {
namespace {

// dz where d_router is wanted, else null. That of no slots may be null: then any address, which nothing is read through.
const void* dz_of(const BackwardParams& b) {
  if (b.d_router == nullptr) return nullptr;
  return b.dz == nullptr ? b.d_router : b.dz;
}

// ---- multiply-adds ----

// A thread owns a column and 8 ranks; dz is one more rank. Pieces are cut where the position is a multiple of
// plan.chunk, and numbered so that a block finds its own by bisection.
template <class T>
__global__ void __launch_bounds__(kGramSimtThreads, 1) gram_simt(const GramParams p) {
  next_may_begin();
  constexpr int kStage = plan_cuda::kGramSimtStage, kRanks = kGramSimtRanks;
  constexpr int kEach = kRanks * kGramSimtColumns / kGramSimtThreads;
  MOA_DYNAMIC_SHARED(T, shared);
  const Piece piece = piece_of(p, blockIdx.z);
  if (!piece.there) return;
  const int64_t j0 = blockIdx.y * static_cast<int64_t>(kRanks), used = p.c.used(piece.expert);
  const int64_t c0 = blockIdx.x * static_cast<int64_t>(kGramSimtColumns);
  const int column = threadIdx.x % kGramSimtColumns, part = threadIdx.x / kGramSimtColumns * kEach;
  const bool router = p.dz != nullptr && p.c.rank < j0 + kRanks;
  T group[kEach] = {}, total[kEach] = {};
  if (j0 < used || router) {
    const SimtStream<T> tile(p, piece, shared, c0, j0, used, router);
    tile.run(
        [&](const T* x, const T* coef) {
          T sum[kEach] = {};
#pragma unroll 4
          for (int row = 0; row < kStage; ++row) {
            const T v = x[row * kGramSimtColumns + column];
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
            group[i] = T(0);
          }
        });
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) store_sum<T>(p, piece, j0 + part + i, c0 + column, total[i]);
}

// A thread an element: the planes of the expert whose first piece is in chunk blockIdx.y, added in order.
template <class T>
__global__ void __launch_bounds__(kGramSimtThreads) gram_finish(const GramParams p) {
  await_launch();
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
  const int64_t plane = (p.c.rank + 1) * p.width, i = blockIdx.x * static_cast<int64_t>(kGramSimtThreads) + threadIdx.x;
  if (i >= (p.c.rank + (p.dz == nullptr ? 0 : 1)) * p.width) return;
  const T* const from = static_cast<const T*>(p.planes) + i;
  T sum = from[(2 * chunk + 1) * plane];
  for (int64_t c = chunk + 1; c <= (stop - 1) / size; ++c) sum += from[2 * c * plane];
  store_place<T>(p, lo, i / p.width, i % p.width, sum);
}

size_t work_of(const GramParams& p) {
  if (p.plan.chunks <= 1) return 0;
  return static_cast<size_t>(2 * p.plan.chunks * (p.c.rank + 1) * p.width) * (p.type == DType::f64 ? 8 : 4);
}

template <class T>
cudaError_t launch_simt(const GramParams& p, cudaStream_t stream) {
  using namespace plan_cuda;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.width, kGramSimtColumns)),
                  static_cast<unsigned>(ceil_div(p.c.rank + (p.dz == nullptr ? 0 : 1), kGramSimtRanks)),
                  static_cast<unsigned>(p.plan.pieces));
  const cudaError_t error = MOA_LAUNCH((gram_simt<T>), grid, kGramSimtThreads, SimtStream<T>::kBytes, stream, p);
  if (error != cudaSuccess || p.plan.chunks <= 1) return error;
  const dim3 all(static_cast<unsigned>(ceil_div((p.c.rank + 1) * p.width, kGramSimtThreads)),
                 static_cast<unsigned>(p.plan.chunks - 1));
  return MOA_LAUNCH_EARLY((gram_finish<T>), all, kGramSimtThreads, 0, stream, p);
}
cudaError_t launch(GramParams p, void* work, cudaStream_t stream) {
  if (p.width == 0 || p.c.experts == 0) return cudaSuccess;
  p.planes = work;
  return p.type == DType::f64 ? launch_simt<double>(p, stream) : launch_simt<float>(p, stream);
}

GramParams params_of(DType type, const Coefficients& c, const void* x, int64_t ldx, int64_t width) {
  GramParams p{};
  p.type = type;
  p.c = c;
  p.width = width;
  p.x = x;
  p.ldx = ldx;
  const int64_t element = type == DType::f64 ? 8 : 4;
  p.x_direct = chunks(x, ldx, element);
  p.values_direct = chunks(c.values, c.rank, element);
  p.out_j = width;
  p.out_c = 1;
  p.plan = plan_cuda::gram(c.slots, c.experts, plan_cuda::kGramSimtStage);
  return p;
}
// dA and d_router
GramParams params_of_a(const BackwardParams& b) {
  GramParams p = params_of(b.x_type, coefficients_of(b, b.u), b.x, b.ldx, b.in);
  p.dz = dz_of(b);
  p.out = b.dA;
  p.d_router = b.d_router;
  return p;
}
GramParams params_of_b(const BackwardParams& b) {
  GramParams p = params_of(b.x_type, coefficients_of(b, b.h), b.dy, b.lddy, b.out);
  p.out = b.dB;
  p.out_j = 1;
  p.out_c = b.rank;
  return p;
}
// The router's: one segment of all tokens, whose ranks are the experts.
GramParams params_of(const RouterBackwardParams& r) {
  GramParams p = params_of(r.x_type, coefficients_of(r), r.x, r.ldx, r.in);
  p.out = r.d_weight;
  return p;
}

// ---- tensor cores ----

struct GramLaunch : GramTiles {
  DType type;
  bool exact;
  size_t work;
};

template <class T, int kFrags, bool kExact>
cudaError_t launch_tiles(const GramLaunch& p, cudaStream_t stream) {
  using namespace plan_cuda;
  const int64_t tiles = p.side[0].tiles + int64_t{p.side[1].tiles};
  if (tiles == 0 || p.c.experts == 0) return cudaSuccess;
  const GramTiles& all = p;
  const int64_t rows = p.plan.stages + ceil_div(p.plan.pieces, kGramRowsThreads / kWarp);
  const cudaError_t error =
      MOA_LAUNCH((gram_rows<T, kExact>), static_cast<unsigned>(rows), kGramRowsThreads, 0, stream, all);
  if (error != cudaSuccess) return error;
  const size_t stages = kGramStages * (kGramStage * kGramColumns * sizeof(T) + static_cast<size_t>(p.shared));
  const size_t sums = (8 * kFrags + 1) * kGramPitch * sizeof(float), shared = stages > sums ? stages : sums;
  return MOA_LAUNCH_EARLY((gram_mma<T, kFrags, kExact>), static_cast<unsigned>(p.plan.pieces * tiles), kGramThreads,
                          shared, stream, all);
}
template <class T>
cudaError_t launch_tiles(const GramLaunch& p, cudaStream_t stream) {
  if (p.exact) return launch_tiles<T, plan_cuda::gram_fragments(true, 0), true>(p, stream);
  return p.c.rank <= 16 ? launch_tiles<T, plan_cuda::gram_fragments(false, 16), false>(p, stream)
                        : launch_tiles<T, plan_cuda::gram_fragments(false, 17), false>(p, stream);
}
cudaError_t launch(const GramLaunch& p, cudaStream_t stream) {
  return p.type == DType::f16 ? launch_tiles<__half>(p, stream) : launch_tiles<__nv_bfloat16>(p, stream);
}

template <class T, bool kExact>
void set_records(GramLaunch* p) {
  const int frags = plan_cuda::gram_fragments(kExact, p->c.rank), head = p->dz == nullptr ? 0 : kGramDz<T>;
  p->record = head;
  for (GramSide& side : p->side) {
    side.first = p->record;
    p->record += side.units * kGramUnit<T, kExact>;
    const int shared = (&side == p->side ? head : 0) + (side.units < frags ? side.units : frags) * kGramUnit<T, kExact>;
    p->shared = shared > p->shared ? shared : p->shared;
  }
}

// dA and d_router are side 0, dB is side 1; `wanted`: out, or d_router, is not null.
void set_side(GramLaunch* p, int which, const void* x, int64_t ldx, int64_t width, const void* values, void* out,
              bool by_column, bool wanted) {
  using namespace plan_cuda;
  GramSide& side = p->side[which];
  side.x = x;
  side.ldx = ldx;
  side.width = width;
  side.values = values;
  side.out = out;
  side.x_direct = chunks(x, ldx, 2);
  side.values_direct = chunks(values, p->c.rank, 4);
  side.by_column = by_column;
  side.out_direct = reinterpret_cast<uintptr_t>(out) % 16 == 0 && (by_column ? p->c.rank : width) % 4 == 0;
  const int64_t units = ceil_div(p->c.rank, 8);
  side.units = out == nullptr ? 0 : static_cast<int>(p->exact ? units : units + units % 2);
  const int64_t rank_tiles = out == nullptr ? 1 : ceil_div(p->c.rank, 8 * gram_fragments(p->exact, p->c.rank));
  side.rank_tiles = static_cast<unsigned>(rank_tiles);
  side.tiles = wanted ? static_cast<unsigned>(rank_tiles * ceil_div(width, kGramColumns)) : 0;
}

// Places in `work`, one array after another, each at a whole 256 bytes.
void arrange(GramLaunch* p, void* work) {
  if (p->type == DType::f16) {
    p->exact ? set_records<__half, true>(p) : set_records<__half, false>(p);
  } else {
    p->exact ? set_records<__nv_bfloat16, true>(p) : set_records<__nv_bfloat16, false>(p);
  }
  const auto take = [&](int64_t bytes) {
    char* const at = static_cast<char*>(work) + (work == nullptr ? 0 : p->work);
    p->work += static_cast<size_t>(plan_cuda::ceil_div(bytes, 256) * 256);
    return static_cast<void*>(work == nullptr ? nullptr : at);
  };
  const int64_t tiles = p->side[0].tiles + int64_t{p->side[1].tiles};
  const int64_t rows = 8 * plan_cuda::gram_fragments(p->exact, p->c.rank) + 1;
  p->tokens = static_cast<GramTokens*>(take(p->plan.stages * kGramStage * 4));
  p->records = static_cast<unsigned char*>(take(p->plan.stages * p->record));
  p->pieces = static_cast<GramPiece*>(take(p->plan.pieces * static_cast<int64_t>(sizeof(GramPiece))));
  p->counters = static_cast<uint32_t*>(take(p->plan.planes * tiles * 4));
  p->planes = static_cast<float*>(take(p->plan.planes * tiles * rows * plan_cuda::kGramColumns * 4));
}

GramLaunch tiles_of(const BackwardParams& b, void* work) {
  GramLaunch p{};
  p.type = b.x_type;
  p.c = coefficients_of(b, nullptr);
  p.out_f32 = b.adapter_type == DType::f32;
  // The same for dA and dB, together and alone.
  p.plan = plan_cuda::gram_tiles(p.c.slots, p.c.experts, b.rank, plan_cuda::most(b.in, b.out), false);
  p.dz = dz_of(b);
  p.d_router = static_cast<float*>(b.d_router);
  set_side(&p, 0, b.x, b.ldx, b.in, b.u, b.dA, false, b.dA != nullptr || b.d_router != nullptr);
  set_side(&p, 1, b.dy, b.lddy, b.out, b.h, b.dB, true, b.dB != nullptr);
  arrange(&p, work);
  return p;
}
GramLaunch tiles_of(const RouterBackwardParams& r, void* work) {
  GramLaunch p{};
  p.type = r.x_type;
  p.exact = true;
  p.c = coefficients_of(r);
  p.out_f32 = true;
  p.plan = plan_cuda::gram_tiles(p.c.slots, 1, p.c.rank, r.in, true);
  set_side(&p, 0, r.x, r.ldx, r.in, r.dz, r.d_weight, false, true);
  arrange(&p, work);
  return p;
}

}  // namespace

size_t gram_work(const BackwardParams& b) {
  if (is_half(b.x_type)) return tiles_of(b, nullptr).work;
  const size_t a = b.dA == nullptr && b.d_router == nullptr ? 0 : work_of(params_of_a(b));
  const size_t other = b.dB == nullptr ? 0 : work_of(params_of_b(b));
  return a > other ? a : other;
}
cudaError_t gram_cuda(const BackwardParams& b, void* work, cudaStream_t stream) {
  if (is_half(b.x_type)) return launch(tiles_of(b, work), stream);
  if (b.dA != nullptr || b.d_router != nullptr) {
    const cudaError_t error = launch(params_of_a(b), work, stream);
    if (error != cudaSuccess) return error;
  }
  return b.dB == nullptr ? cudaSuccess : launch(params_of_b(b), work, stream);
}

size_t router_gram_work(const RouterBackwardParams& r) {
  return is_half(r.x_type) ? tiles_of(r, nullptr).work : work_of(params_of(r));
}
cudaError_t router_gram_cuda(const RouterBackwardParams& r, void* work, cudaStream_t stream) {
  if (r.experts == 0) return cudaSuccess;
  return is_half(r.x_type) ? launch(tiles_of(r, work), stream) : launch(params_of(r), work, stream);
}

}  // namespace moa
