// What expand.cu and gram.cu share: the coefficients of sorted positions, c[p] = w s v[p] of expert e's used ranks.
//
//   v [slots, rank] accumulator type (h or u), or the sum of planes of it; or `all` of [tokens, experts, rank], of which
//   p's are those of its token and expert; w = weights[order[p]], s = scaling scale[e], each 1 where null
//
// Without offsets there is one segment of all slots, without order position p is slot p: a dense product then, with one
// "expert" whose rank is what is summed over (the router's backward). What comes from outside is clamped where it
// becomes an address.
#pragma once
#include "lora/cuda.h"
#include "lora/tile.cuh"

namespace moa {

struct Coefficients {
  const int32_t *offsets, *order, *ranks;  // or null
  int64_t experts, slots, top_k, rank;
  const void* values;   // [slots, rank]
  const void* weights;  // [slots] or null
  const double* scale;  // [experts] or null
  double scaling;
  int64_t planes;  // of values; gram takes one alone
  bool all;        // for expand_wide.cu alone

  __device__ __forceinline__ int64_t offset_at(int64_t e) const {
    if (offsets == nullptr) return e == 0 ? 0 : slots;
    return clamp(offsets[e], 0, slots);
  }
  __device__ __forceinline__ int64_t slot_at(int64_t position) const {
    return order == nullptr ? position : clamp(order[position], 0, slots - 1);
  }
  __device__ __forceinline__ int64_t token_of(int64_t slot) const {  // 32 bits: a division of 64 is many instructions
    return static_cast<unsigned>(slot) / static_cast<unsigned>(top_k);
  }
  __device__ __forceinline__ int64_t used(int64_t e) const {
    return ranks == nullptr ? rank : clamp(ranks[e], 0, rank);
  }
  // w s of a slot
  template <class A>
  __device__ __forceinline__ A factor(int64_t e, int64_t slot) const {
    const A s = static_cast<A>(scaling * (scale == nullptr ? 1.0 : scale[e]));
    return weights == nullptr ? s : s * static_cast<const A*>(weights)[slot];
  }
  template <class A>
  __device__ __forceinline__ A value(int64_t position, int64_t j) const {
    const A* const at = static_cast<const A*>(values) + position * rank + j;
    A sum = at[0];
#pragma unroll 4
    for (int64_t s = 1; s < planes; ++s) sum += at[s * slots * rank];
    return sum;
  }
};

inline Coefficients coefficients_of(const LoraParams& p, const void* values) {
  return {p.seg.offsets, p.seg.order, p.ranks, p.seg.experts, p.seg.tokens * p.seg.top_k,
          p.seg.top_k,   p.rank,      values,  p.weights,     p.scale,
          p.scaling,     1,           false};
}
// The logits' gradients as coefficients of one segment of all tokens.
inline Coefficients coefficients_of(const RouterBackwardParams& p) {
  Coefficients c{};
  c.experts = 1;
  c.slots = p.tokens;
  c.top_k = 1;
  c.rank = p.experts;
  c.values = p.dz;
  c.scaling = 1.0;
  c.planes = 1;
  return c;
}

// Rows of 64 16-bit elements in shared memory, their 16-byte chunks exchanged so that neither copies nor ldmatrix meet a
// bank twice.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * 64 + ((chunk ^ (row & 7)) * 8); }

// Row i of eight in the order 0 4 2 6 1 5 3 7: a warp that writes one, two or four chunks of each meets no bank twice.
__device__ __forceinline__ int spread(int i) { return (i & ~7) | (i & 1) << 2 | (i & 2) | (i >> 2 & 1); }

// For mixture_cuda (expand.cu): how many planes a shrink has its sums in, and the shrink that leaves them so. And those of
// the dense pass, 0 where the shrink has none: every expert's.
int64_t shrink_planes(const ForwardParams& p);
cudaError_t shrink_planes_cuda(const ForwardParams& p, void* planes, cudaStream_t stream);
int64_t shrink_all_planes(const ForwardParams& p);
cudaError_t shrink_all_cuda(const ForwardParams& p, void* planes, cudaStream_t stream);

// For router_backward.cu: dx += dz W by multiply-adds (expand.cu), and dW (gram.cu).
cudaError_t router_dx_cuda(const RouterBackwardParams& p, cudaStream_t stream);
size_t router_gram_work(const RouterBackwardParams& p);
cudaError_t router_gram_cuda(const RouterBackwardParams& p, void* work, cudaStream_t stream);

}  // namespace moa
