// The multiply-add tile of expand.cu: for float32 and float64, for what the tensor cores' tile cannot hold, and for the
// router's dx.
#pragma once
#include "lora/expand_params.cuh"
#include "lora/positions.cuh"

namespace moa {

template <class A>
struct alignas(16) ExpandSimtShared {
  static constexpr int kRows = plan_cuda::kExpandSimtRows, kRanks = plan_cuda::kExpandSimtRanks;
  A tile[kRows * plan_cuda::kExpandColumns];
  A coef[kRows * kRanks];
  Group<A, kRows> group;
  Runs runs;
};

// Multiply-adds: a thread owns a column and every second position of a group.
// Tile `row_tile` of 32 tokens, 64 columns from 64 `part_of_columns` on.
template <class T>
__device__ __forceinline__ void expand_simt_block(const ExpandParams& p, int64_t row_tile, int64_t part_of_columns,
                                                  ExpandSimtShared<Acc<T>>* shared) {
  using A = Acc<T>;
  using Shared = ExpandSimtShared<A>;
  constexpr int kRows = Shared::kRows, kRanks = Shared::kRanks;
  constexpr int kExpandColumns = plan_cuda::kExpandColumns, kExpandThreads = plan_cuda::kExpandThreads;
  A* const tile = shared->tile;
  A* const coef = shared->coef;
  auto* const group = &shared->group;
  auto* const runs = &shared->runs;
  const int64_t token = row_tile * kRows, o0 = part_of_columns * kExpandColumns;
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

}  // namespace moa
