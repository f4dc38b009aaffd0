// The tile of tile.cuh by multiply-adds: A float or double for everything, 8 kCols columns.
//
// Thread (ty, tx) of 16 x 8 owns rows ty + 16 i and columns tx + 8 j. Rows of shared memory are 32 k and 16 bytes long,
// so that eight neighbouring rows lie in different banks. Products of 32 k are summed apart and then added to the
// total: one run over thousands of k would round to more than 1e-6 of the norm in float32.
#pragma once
#include "lora/tile.cuh"

namespace moa {

template <class A, int kCols>
struct SimtTile {
  static constexpr int kRows = plan_cuda::kTileRows, kThreads = plan_cuda::kTileThreads;
  static constexpr int kDepth = plan_cuda::kSimtDepth;
  static constexpr int kChunk = 16 / sizeof(A), kPer = kDepth / kChunk;  // elements a chunk, chunks a row
  static constexpr int kLd = kDepth + kChunk, kWidth = 8 * kCols;
  static constexpr int kElements = 2 * (kRows + kWidth) * kLd;  // two stages
  static_assert(kElements * sizeof(A) <= 47 * 1024, "static shared memory");

  Panel panel;
  int64_t k1;
  bool x_direct;
  A* shared;
  const A** rows;  // [kRows] shared
  A total[4][kCols];

  __device__ __forceinline__ SimtTile(const Panel& panel, int64_t k1, bool x_direct, A* shared, const A** rows)
      : panel(panel), k1(k1), x_direct(x_direct), shared(shared), rows(rows) {}

  __device__ __forceinline__ void stage(int slot, const A* any, int64_t k) const {
    A* const xs = shared + slot * (kRows + kWidth) * kLd;
    A* const ps = xs + kRows * kLd;
    for (int i = threadIdx.x; i < kRows * kPer; i += kThreads) {
      const int row = i / kPer, chunk = i % kPer;
      const int64_t at = k + chunk * kChunk, n = rows[row] != nullptr ? k1 - at : 0;
      stage_chunk(xs + row * kLd + chunk * kChunk, n > 0 ? rows[row] + at : any, n, x_direct);
    }
    const A* const base = static_cast<const A*>(panel.base);
    if (panel.columns) {
      for (int i = threadIdx.x; i < kWidth * kDepth; i += kThreads) {
        const int n = i % kWidth, row = i / kWidth;
        ps[n * kLd + row] = n < panel.rows && k + row < k1 ? base[(k + row) * panel.ld + n] : A(0);
      }
      return;
    }
    const A* const router = static_cast<const A*>(panel.router);
    const A* const none = base != nullptr ? base : router;  // whole chunks if the panel is in them, which x need not be
    for (int i = threadIdx.x; i < kWidth * kPer; i += kThreads) {
      const int row = i / kPer, chunk = i % kPer, other = row - panel.rows;
      const int64_t at = k + chunk * kChunk, n = row < panel.rows + panel.router_rows ? k1 - at : 0;
      const A* const src = n <= 0      ? none
                           : other < 0 ? base + row * panel.ld + at
                                       : router + other * panel.router_ld + at;
      stage_chunk(ps + row * kLd + chunk * kChunk, src, n, panel.direct);
    }
  }

  __device__ __forceinline__ void compute(int slot) {
    struct alignas(16) Chunk {
      A v[kChunk];
    };
    const A* const xs = shared + slot * (kRows + kWidth) * kLd + threadIdx.x / 8 * kLd;
    const A* const ps = shared + (slot * (kRows + kWidth) + kRows + threadIdx.x % 8) * kLd;
    A part[4][kCols] = {};
#pragma unroll 2
    for (int k = 0; k < kDepth; k += kChunk) {
      Chunk x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const Chunk*>(xs + 16 * i * kLd + k);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const Chunk p = *reinterpret_cast<const Chunk*>(ps + 8 * j * kLd + k);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int v = 0; v < kChunk; ++v) part[i][j] += x[i].v[v] * p.v[v];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) total[i][j] += part[i][j];
  }

  template <class RowOf>
  __device__ __forceinline__ void run(int64_t k0, const A* any, const RowOf& row_of) {
    for (int m = threadIdx.x; m < kRows; m += kThreads) rows[m] = row_of(m);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) total[i][j] = A(0);
    __syncthreads();
    const int64_t steps = (k1 - k0 + kDepth - 1) / kDepth;
    if (steps > 0) stage(0, any, k0);
    cp_async_commit();
    for (int64_t step = 0; step < steps; ++step) {
      cp_async_wait<0>();
      __syncthreads();
      if (step + 1 < steps) stage((step + 1) % 2, any, k0 + (step + 1) * kDepth);
      cp_async_commit();
      compute(step % 2);
    }
    cp_async_wait<0>();
  }
};

}  // namespace moa
