// What the tensor-core tiles of expand.cu and expand_wide.cu know of the routing: where each slot is in the sorted order.
// A small kernel in front of them makes it (expand.cu); with few slots each tile does so for itself.
//
//   places [slots]   expert, position and number of twins of a slot
#pragma once
#include "lora/combine.cuh"

namespace moa {

struct alignas(8) Place {
  int position;
  int16_t expert;  // or -1: none, or the slot is a twin of one before it
  uint16_t twins;  // positions behind this one of the same token, which names the expert again
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

}  // namespace moa
