// Which positions a block of expand.cu adds to its tile of tokens [token, token + rows): runs of each expert, and groups of
// a run. The whole block calls each_run; fill is for its first threads. Positions out of order, which sort_by_expert
// never gives, make sums undefined, not addresses.
#pragma once
#include "lora/combine.cuh"

namespace moa {

// The first position in [lo, hi) whose slot is not below `slot`.
__device__ __forceinline__ int64_t lower_bound(const Coefficients& c, int64_t lo, int64_t hi, int64_t slot) {
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (c.slot_at(mid) < slot) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

struct Runs {  // shared: of plan_cuda::kExpandThreads experts, the positions of this block's tokens
  int begin[plan_cuda::kExpandThreads], end[plan_cuda::kExpandThreads];
  unsigned some[plan_cuda::kExpandThreads / kWarp];  // bit per expert: has any
};

// f(e, begin, end) for every expert with positions of tokens [token, token + rows); the whole block.
template <class F>
__device__ __forceinline__ void each_run(const Coefficients& c, int64_t token, int rows, Runs* runs, const F& f) {
  for (int64_t first = 0; first < c.experts; first += plan_cuda::kExpandThreads) {
    const int64_t e = first + threadIdx.x;
    int64_t begin = 0, end = 0;
    if (e < c.experts) {
      const int64_t lo = c.offset_at(e), hi = c.offset_at(e + 1);
      begin = lower_bound(c, lo, hi, token * c.top_k);
      end = lower_bound(c, begin, hi, (token + rows) * c.top_k);
    }
    __syncthreads();  // all have left the runs of before
    runs->begin[threadIdx.x] = static_cast<int>(begin);
    runs->end[threadIdx.x] = static_cast<int>(end);
    const unsigned some = __ballot_sync(kFullMask, begin < end);
    if (threadIdx.x % kWarp == 0) runs->some[threadIdx.x / kWarp] = some;
    __syncthreads();
    for (int warp = 0; warp < plan_cuda::kExpandThreads / kWarp; ++warp) {
      for (unsigned left = runs->some[warp]; left != 0; left &= left - 1) {
        const int i = warp * kWarp + __ffs(static_cast<int>(left)) - 1;
        f(first + i, static_cast<int64_t>(runs->begin[i]), static_cast<int64_t>(runs->end[i]));
      }
    }
  }
}

// What positions first .. of an expert, kSize at most, add to the tile.
template <class A, int kSize>
struct Group {
  int row[kSize];   // of the tile; kAgain: the token of the position before; kNone: not of this tile, or no position
  A factor[kSize];  // w s
  static constexpr int kNone = -1, kAgain = -2;

  // One thread per position; the caller waits for them.
  __device__ __forceinline__ void fill(const Coefficients& c, int64_t e, int64_t first, int count, int64_t token,
                                       int rows) {
    const int i = threadIdx.x;
    if (i >= kSize) return;
    row[i] = kNone;
    factor[i] = A(0);
    if (i >= count) return;
    const int64_t slot = c.slot_at(first + i);
    const int64_t t = c.token_of(slot);
    if (t < token || t >= token + rows) return;
    const bool again = i > 0 && c.token_of(c.slot_at(first + i - 1)) == t;
    row[i] = again ? kAgain : static_cast<int>(t - token);
    factor[i] = c.factor<A>(e, slot);
  }
  // Sum of value(i) over position i and those behind it of the same token; 0 where position i adds nothing itself.
  template <class Value>
  __device__ __forceinline__ A merged(int i, const Value& value) const {
    if (row[i] < 0) return A(0);
    A sum = value(i);
    for (int q = i + 1; q < kSize && row[q] == kAgain; ++q) sum += value(q);
    return sum;
  }
};

}  // namespace moa
