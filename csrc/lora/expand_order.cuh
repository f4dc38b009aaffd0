// What expand.cu's tensor-core tiles know of the routing: where each slot is in the sorted order, and in which order the
// tiles take the tokens. Two small kernels in front of them make it; with few slots each tile does so for itself.
//
//   places [slots]   expert, position and number of twins of a slot
//   rows   [tokens]  token of each row of the tiles
//
// A tile of 128 tokens reads B of every expert that one of them chose: with 64 experts, all 64 of them. Tokens are
// therefore grouped by the pair of experts they chose: pairs (low, high) by stripes of 8 low experts, along high, and in
// it along low. At T = 8192, k = 2, E = 64 there are 4 tokens a pair; 128 rows are then 32 pairs, which 13 experts make
// (drawn at random; 8 and 4, and where a stripe ends more), and 8 rows take 4 experts instead of 14.
//
// Rows of one pair come in any order (atomics place them), which shows nowhere: a token's sum does not depend on its
// neighbours.
#pragma once
#include "lora/combine.cuh"

namespace moa {

struct alignas(8) Place {
  int position;
  int16_t expert;  // or -1: none, or the slot is a twin of one before it
  uint16_t twins;  // positions behind this one of the same token, which names the expert again
};

struct OrderParams {
  Coefficients c;
  int64_t tokens;
  Place* places;
  int32_t* rows;
};

// Over the lanes up to the own one, which is included.
__device__ __forceinline__ int sum_to_lane(int v) {
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const int other = __shfl_up_sync(kFullMask, v, by);
    if (static_cast<int>(threadIdx.x % kWarp) >= by) v += other;
  }
  return v;
}

__device__ __forceinline__ Place place_of(const Coefficients& c, int64_t position, int64_t slot) {
  int64_t lo = 0, hi = c.experts;  // the last offset that is not behind the position
  while (lo < hi) {
    const int64_t mid = (lo + hi + 1) / 2;
    if (c.offset_at(mid) <= position) {
      lo = mid;
    } else {
      hi = mid - 1;
    }
  }
  Place place{static_cast<int>(position), -1, 0};
  if (lo == c.experts || c.offset_at(lo) > position) return place;
  const int64_t begin = c.offset_at(lo), end = c.offset_at(lo + 1), t = c.token_of(slot);
  const auto same = [&](int64_t other) { return c.token_of(c.slot_at(other)) == t; };
  if (position > begin && same(position - 1)) return place;
  place.expert = static_cast<int16_t>(lo);
  while (position + place.twins + 1 < end && place.twins < 0xffff && same(position + place.twins + 1)) ++place.twins;
  return place;
}

__global__ void __launch_bounds__(plan_cuda::kPlaceThreads) expand_places(const OrderParams p) {
  const int64_t position = blockIdx.x * static_cast<int64_t>(plan_cuda::kPlaceThreads) + threadIdx.x;
  if (position >= p.c.slots) return;
  const int64_t slot = p.c.order[position];
  if (slot >= 0 && slot < p.c.slots) p.places[slot] = place_of(p.c, position, slot);
}

// A block orders the tokens of a window; a thread has every 1024th.
__global__ void __launch_bounds__(plan_cuda::kClusterThreads) expand_rows(const OrderParams p) {
  constexpr int kSide = plan_cuda::kClusterSide, kBins = kSide * kSide, kThreads = plan_cuda::kClusterThreads;
  constexpr int kEach = kBins / kThreads;
  static_assert(kBins % kThreads == 0 && kThreads == kWarp * kWarp, "a thread's bins; one warp scans the warps' sums");
  static_assert(kSide % 8 == 0 && (kSide & (kSide - 1)) == 0, "whole stripes; masks");
  MOA_SHARED(int, bins, kBins);
  MOA_SHARED(int, sums, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = blockIdx.x * plan_cuda::kClusterWindow;
  const int count = static_cast<int>(clamp(p.tokens - first, 0, plan_cuda::kClusterWindow));
  int shift = 0;
  while ((p.c.experts - 1) >> shift >= kSide) ++shift;
  const auto bin = [&](int t) {
    const Place* const at = p.places + (first + t) * p.c.top_k;
    int a = at[0].expert, b = p.c.top_k > 1 ? at[1].expert : a;
    if (a < 0) a = b;
    if (b < 0) b = a;
    const int low = (a < b ? a : b) >> shift & (kSide - 1), high = (a < b ? b : a) >> shift & (kSide - 1);
    return (low / 8 * kSide + high) * 8 + low % 8;
  };
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < count; t += kThreads) atomicAdd(&bins[bin(t)], 1);
  __syncthreads();

  int own[kEach], total = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    own[i] = bins[threadIdx.x * kEach + i];
    total += own[i];
  }
  const int upto = sum_to_lane(total);
  if (lane == kWarp - 1) sums[warp] = upto;
  __syncthreads();
  if (warp == 0) sums[lane] = sum_to_lane(sums[lane]);
  __syncthreads();
  int start = upto - total + (warp == 0 ? 0 : sums[warp - 1]);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    bins[threadIdx.x * kEach + i] = start;
    start += own[i];
  }
  __syncthreads();
  for (int t = threadIdx.x; t < count; t += kThreads)
    p.rows[first + atomicAdd(&bins[bin(t)], 1)] = static_cast<int32_t>(first + t);
}

}  // namespace moa
