// Gram on tensor cores: a block owns a piece of an expert's positions, 128 columns of x and up to 64 ranks, and a warp
// 16 of the columns with all the ranks. 16 columns of x are the rows of a product, 8 ranks its columns, positions its
// depth; both operands lie by positions and are turned by ldmatrix_trans. Coefficients come ready from gram_rows.cuh,
// so all that the stages need is under way by cp.async, and tokens are loaded a stage before they are.
//
// A piece is summed in groups of stages. Within a group the tensor cores add, whose sums of 16-bit coefficients are far
// better than these; what keeps float32 (dz, kExact) is added to the group every 32 positions. Of an expert in several
// pieces every block but the last to come leaves its sums in a plane, and that one adds them all in order: who is last
// says who adds, not how. No atomics on sums, bitwise reproducible.
#pragma once
#include "lora/gram_rows.cuh"

namespace moa {
namespace {

constexpr int kGramPitch = kGramColumns + 4;  // floats of a row of sums
// Where a rank's sum is: fragments as they are written, rows of columns and of ranks as they are read meet no bank
// twice.
__device__ __forceinline__ int gram_sum_at(int j, int column) { return j * kGramPitch + (column ^ (j & 8)); }

// An element of x's tile: rows of 16 chunks, exchanged within halves so that neither copies nor ldmatrix meet a bank
// twice.
__device__ __forceinline__ int gram_x_at(int row, int chunk) { return row * kGramColumns + ((chunk ^ (row & 7)) * 8); }

template <class T>
__device__ __forceinline__ void store_columns(const GramTiles& p, const GramSide& side, int64_t at, int n, float4 v) {
  if (side.out_direct && n >= 4) {
    if (p.out_f32) {
      *reinterpret_cast<float4*>(static_cast<float*>(side.out) + at) = v;
    } else {
      *reinterpret_cast<uint2*>(static_cast<T*>(side.out) + at) = make_uint2(pack2<T>(v.x, v.y), pack2<T>(v.z, v.w));
    }
    return;
  }
  const float each[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= n) continue;
    if (p.out_f32) {
      static_cast<float*>(side.out)[at + i] = each[i];
    } else {
      static_cast<T*>(side.out)[at + i] = from_acc<T>(each[i]);
    }
  }
}

// sums: [router's where head is 1, then ranks][kGramPitch]
template <class T>
__device__ __forceinline__ void store_tile(const GramTiles& p, const GramSide& side, const GramPiece& piece,
                                           const float* sums, int head, int j0, int ranks, int64_t c0) {
  const int columns = static_cast<int>(side.width - c0 < kGramColumns ? side.width - c0 : kGramColumns);
  if (head != 0) {
    for (int c = threadIdx.x; c < columns; c += kGramThreads) p.d_router[piece.expert * side.width + c0 + c] = sums[c];
  }
  if (side.out == nullptr) return;
  const float* const from = sums + head * kGramPitch;
  const int there = static_cast<int>(p.c.rank - j0 < ranks ? p.c.rank - j0 : ranks), used = piece.used - j0;
  if (!side.by_column) {
    const int64_t base = (piece.expert * p.c.rank + j0) * side.width + c0;
    for (int i = threadIdx.x; i < there * (kGramColumns / 4); i += kGramThreads) {
      const int j = i / (kGramColumns / 4), c = i % (kGramColumns / 4) * 4;
      const float4 v =
          j < used ? *reinterpret_cast<const float4*>(from + gram_sum_at(j, c)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (c < columns) store_columns<T>(p, side, base + j * side.width + c, columns - c, v);
    }
    return;
  }
  const int64_t base = (piece.expert * side.width + c0) * p.c.rank + j0;
  for (int i = threadIdx.x; i < (there + 15) / 16 * 4 * kGramColumns; i += kGramThreads) {
    const int c = i / 4 % kGramColumns, j = i / (4 * kGramColumns) * 16 + i % 4 * 4;
    float v[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) v[q] = j + q < used ? from[gram_sum_at(j + q, c)] : 0.0f;
    if (c < columns) store_columns<T>(p, side, base + c * p.c.rank + j, there - j, make_float4(v[0], v[1], v[2], v[3]));
  }
}

// The sums of all pieces, by the last block of them to come; false for the others.
__device__ __forceinline__ bool add_pieces(const GramTiles& p, const GramPiece& piece, unsigned tile, float* sums,
                                           int rows, int64_t plane_size, unsigned* arrived) {
  const int64_t tiles = p.side[0].tiles + int64_t{p.side[1].tiles};
  float* const planes = p.planes + (piece.first * tiles + tile) * plane_size;
  float* const own = planes + (piece.plane - piece.first) * tiles * plane_size;
  constexpr int kRow = kGramColumns / 4;
  for (int i = threadIdx.x; i < rows * kRow; i += kGramThreads)
    reinterpret_cast<float4*>(own)[i] = *reinterpret_cast<const float4*>(sums + i / kRow * kGramPitch + i % kRow * 4);
  __syncthreads();  // the plane is written
  if (threadIdx.x == 0) *arrived = arrive(p.counters + piece.first * tiles + tile);
  __syncthreads();
  if (*arrived + 1 != static_cast<unsigned>(piece.pieces)) return false;
  for (int i = threadIdx.x; i < rows * kRow; i += kGramThreads) {
    const float4* from = reinterpret_cast<const float4*>(planes) + i;
    float4 sum = *from;
#pragma unroll 4
    for (int q = 1; q < piece.pieces; ++q) {
      from += tiles * plane_size / 4;
      const float4 v = *from;
      sum.x += v.x;
      sum.y += v.y;
      sum.z += v.z;
      sum.w += v.w;
    }
    *reinterpret_cast<float4*>(sums + i / kRow * kGramPitch + i % kRow * 4) = sum;
  }
  __syncthreads();
  return true;
}

template <class T, int kFrags, bool kExact>
__global__ void __launch_bounds__(kGramThreads, kFrags > 2 ? 2 : plan_cuda::kGramBlocks) gram_mma(const GramTiles p) {
  constexpr bool kHalf = std::is_same<T, __half>::value;
  constexpr int kStages = plan_cuda::kGramStages, kUnit = kGramUnit<T, kExact>;
  constexpr int kX = kGramStage * kGramColumns;                               // elements of x's tile
  constexpr int kChunks = kGramColumns / 8, kApart = kGramThreads / kChunks;  // rows from one of a thread's to the next
  static_assert(kGramThreads == 2 * kGramColumns && kApart * kGramEach == kGramStage && kApart % 8 == 0, "all copied");
  MOA_DYNAMIC_SHARED(unsigned char, shared);
  MOA_SHARED(unsigned, arrived, 1);
  await_launch();
  T* const xs = reinterpret_cast<T*>(shared);                      // [kStages][kGramStage][kGramColumns]
  unsigned char* const coefs = shared + kStages * kX * sizeof(T);  // [kStages][p.shared]

  // Pieces are the fastest index: blocks that run together read the same columns of x.
  const unsigned pieces = static_cast<unsigned>(p.plan.pieces), tile = blockIdx.x / pieces;
  const GramPiece piece = p.pieces[blockIdx.x % pieces];
  if (piece.there == 0) return;
  const bool second = tile >= p.side[0].tiles;
  const GramSide& side = p.side[second ? 1 : 0];
  const unsigned of_side = second ? tile - p.side[0].tiles : tile, rank_tile = of_side % side.rank_tiles;
  const int j0 = static_cast<int>(rank_tile) * 8 * kFrags;
  const int64_t c0 = of_side / side.rank_tiles * static_cast<int64_t>(kGramColumns);
  const int head = p.dz != nullptr && !second && rank_tile == 0 ? 1 : 0;
  int frags = (piece.used - j0 + 7) / 8;
  if (!kExact) frags = (frags + 1) & ~1;
  if (frags > kFrags) frags = kFrags;
  if (frags < 0 || side.units == 0) frags = 0;
  const int steps = frags + head > 0 ? piece.stages : 0;

  // What this thread copies: a chunk of kGramEach rows of x, and chunks of the record.
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, own_row = threadIdx.x / kChunks;
  const int own = gram_x_at(own_row, threadIdx.x % kChunks);
  const int64_t column = c0 + threadIdx.x % kChunks * 8, columns = side.width - column;
  const bool whole = side.x_direct && c0 + kGramColumns <= side.width;
  const T* const x = static_cast<const T*>(side.x) + (columns > 0 ? column : 0);
  const int64_t ldx = side.ldx;
  const unsigned char* record =
      p.records + static_cast<int64_t>(piece.stage) * p.record + side.first + j0 / 8 * kUnit - head * kGramDz<T>;
  const int bytes = head * kGramDz<T> + frags * kUnit;
  const GramTokens* tokens = p.tokens + static_cast<int64_t>(piece.stage) * kApart + own_row;
  const auto issue = [&](int buffer, const GramTokens& ids) {
    const int (&t)[kGramEach] = ids.row;
    T* const to = xs + buffer * kX + own;
    if (whole) {
#pragma unroll
      for (int q = 0; q < kGramEach; ++q)
        cp_async_16(to + q * kApart * kGramColumns, x + (t[q] < 0 ? 0 : t[q]) * ldx, t[q] >= 0);
    } else {
#pragma unroll
      for (int q = 0; q < kGramEach; ++q)
        stage_chunk(to + q * kApart * kGramColumns, x + (t[q] < 0 ? 0 : t[q]) * ldx, t[q] < 0 ? 0 : columns,
                    side.x_direct);
    }
    unsigned char* const coef = coefs + buffer * p.shared;
    for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += kGramThreads * 16)
      cp_async_16(coef + i, record + i, true);
    record += p.record;
  };
  GramTokens ids{};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) issue(s, tokens[s * kApart]);
    cp_async_commit();
  }
  tokens += (kStages - 1) * kApart;
  if (steps > kStages - 1) ids = *tokens;

  // This lane's rows of ldmatrix.
  const int x_at = gram_x_at(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
  const int two_units = lane / 16 * kUnit + lane % 16 * 16;  // 16 positions of two fragments
  float group[kFrags][4] = {}, total[kFrags][4] = {}, group_share[4] = {}, share[4] = {};
  // 32 positions of one fragment, in a float32 sum of their own
  const auto add_exact = [&](float (&to)[4], const uint32_t (&a)[2][4], const unsigned char* coef, int terms,
                             const float* undo, int step) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int term = 0; term < terms; ++term) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, coef + term * kGramFragment + lane * 16);
      mma_m16n8k16<T>(sum, a[0], {b[0], b[1]});
      mma_m16n8k16<T>(sum, a[1], {b[2], b[3]});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] += kHalf ? sum[i] * undo[i % 2 * step] : sum[i];
  };
  int buffer = 0, in_group = 0;
  for (int s = 0; s < steps; ++s) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there; all have left the one before
    if (s + kStages - 1 < steps) {
      issue(buffer == 0 ? kStages - 1 : buffer - 1, ids);
      tokens += kApart;
      if (s + kStages < steps) ids = *tokens;
    }
    cp_async_commit();
    const unsigned char* const dz = coefs + buffer * p.shared;
    const unsigned char* const coef = dz + head * kGramDz<T>;
#pragma unroll
    for (int half = 0; half < kGramStage / 32; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step)
        ldmatrix_x4_trans(a[step], xs + buffer * kX + x_at + (2 * half + step) * 16 * kGramColumns);
      if constexpr (kExact) {
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
          if (f >= frags) continue;
          const float* const undo = reinterpret_cast<const float*>(coef + f * kUnit + 3 * kGramFragment) + 8 * half;
          add_exact(group[f], a, coef + f * kUnit + half * 512, 3, undo + 2 * (lane % 4), 1);
        }
      } else {
#pragma unroll
        for (int f = 0; f < kFrags; f += 2) {
          if (f >= frags) continue;
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, coef + f * kUnit + two_units + (2 * half + step) * 256);
            mma_m16n8k16<T>(group[f], a[step], {b[0], b[1]});
            mma_m16n8k16<T>(group[f + 1], a[step], {b[2], b[3]});
          }
        }
        if (head != 0)
          add_exact(group_share, a, dz + half * 512, 1, reinterpret_cast<const float*>(dz + kGramFragment) + half, 0);
      }
    }
    buffer = buffer == kStages - 1 ? 0 : buffer + 1;
    if (++in_group < p.plan.group && s + 1 < steps) continue;
    in_group = 0;
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[f][i] += group[f][i];
        group[f][i] = 0.0f;
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      share[i] += group_share[i];
      group_share[i] = 0.0f;
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // all have left the last stage
  float* const sums = reinterpret_cast<float*>(shared);
  const int at = 16 * warp + lane / 4;
  if (head != 0) {  // lane 0 of four has hi and mid, lane 1 lo
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float pair = lane % 4 == 0 ? share[2 * i] + share[2 * i + 1] : share[2 * i];
      const float all = pair + __shfl_xor_sync(kFullMask, pair, 1);
      if (lane % 4 == 0) sums[at + 8 * i] = all;
    }
  }
#pragma unroll
  for (int f = 0; f < kFrags; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[head * kGramPitch + gram_sum_at(8 * f + 2 * (lane % 4) + i % 2, at + i / 2 * 8)] = total[f][i];
  __syncthreads();
  if (piece.pieces > 1 &&
      !add_pieces(p, piece, tile, sums, head + 8 * frags, int64_t{8 * kFrags + 1} * kGramColumns, arrived))
    return;
  store_tile<T>(p, side, piece, sums, head, j0, 8 * kFrags, c0);
}

}  // namespace
}  // namespace moa
