// The router's rows of mma_tile.cuh: float32 weights that become terms of T, bfloat16 or float16.
//
// Router weights are cut into terms, w = hi + mid + lo, three T terms of one accumulator: the next stage's, which are
// copied a stage ahead of the others, beside what is being multiplied. Three bfloat16 hold 24 bits, so the products
// x hi, x mid, x lo are exact and sum to x w. float16 has the bits but not the range: the kDepth elements of a row are
// scaled by a power of two that brings the largest to 2^14 .. 2^15, undone as the stage is added. A tile of FFMAs would
// take E times longer than x's bytes from E = 16 on. x of inf gives NaN (inf times a term of 0).
#pragma once
#include "lora/tile.cuh"

namespace moa {

// Of a stage: [8 kRouter][kDepth] floats, and their terms, [3][8 kRouter] rows as those of a panel.
template <class T, class Form>
struct RouterTerms {
  static constexpr int kThreads = Form::kThreads, kDepth = Form::kDepth, kRouter = Form::kRouter;
  static constexpr int kTerms = 24 * kRouter * kDepth, kRaw = 8 * kRouter * kDepth;  // elements
  static constexpr int kQuads = 2 * kRouter * kDepth;  // of the router's floats in a stage
  static constexpr int kQuadsEach = plan_cuda::ceil_div(kQuads, kThreads);
  static constexpr int kCut = 4 * kQuads >= 4 * kThreads ? 4 : 4 * kQuads >= 2 * kThreads ? 2 : 1;  // floats together

  const float* from[kQuadsEach > 0 ? kQuadsEach : 1];
  int left;  // k from here to the end

  // Rows that are not there are the last one again: nobody takes what comes of them.
  __device__ __forceinline__ RouterTerms(const Panel& p, int64_t k0, int64_t k1) : left(static_cast<int>(k1 - k0)) {
#pragma unroll
    for (int i = 0; i < kQuadsEach; ++i) {
      const int at = threadIdx.x + i * kThreads, last = p.router_rows > 0 ? p.router_rows - 1 : 0;
      const int row = at / (kDepth / 4) < last ? at / (kDepth / 4) : last;
      from[i] = static_cast<const float*>(p.router) + row * p.router_ld + k0 + at % (kDepth / 4) * 4;
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void copy(float* raw) {
    const int n = left - 4 * static_cast<int>(threadIdx.x % (kDepth / 4));
#pragma unroll
    for (int i = 0; i < kQuadsEach; ++i) {
      if (kQuads % kThreads != 0 && threadIdx.x + i * kThreads >= kQuads) break;
      float* const to = raw + 4 * (threadIdx.x + i * kThreads);
      if constexpr (kWhole) {
        cp_async_16(to, from[i], n > 0);
      } else {
#pragma unroll 1
        for (int j = 0; j < 4; ++j) to[j] = j < n ? from[i][j] : 0.0f;
      }
      from[i] += kDepth;
    }
    left -= kDepth;
  }
  // A row's floats are those of neighbouring lanes.
  static __device__ __forceinline__ void cut(const float* raw, T* terms, float* inverse) {
#pragma unroll
    for (int i = 0; i < 8 * kRouter * kDepth / (kCut * kThreads); ++i) {
      const unsigned first = kCut * (threadIdx.x + i * kThreads), row = first / kDepth, k = first % kDepth;
      float w[kCut];
      const float* const from = raw + first;
      if constexpr (kCut == 4) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
      } else if constexpr (kCut == 2) {
        const float2 two = *reinterpret_cast<const float2*>(from);
        w[0] = two.x, w[1] = two.y;
      } else {
        w[0] = *from;
      }
      if constexpr (std::is_same<T, __half>::value) {
        float top = 0.0f;
#pragma unroll
        for (int j = 0; j < kCut; ++j) top = fabsf(w[j]) > top ? fabsf(w[j]) : top;
        const float scale = half_scale(warp_max<kDepth / kCut>(top));
#pragma unroll
        for (int j = 0; j < kCut; ++j) w[j] *= scale;
        if (k == 0) inverse[row] = __uint_as_float((254u << 23) - __float_as_uint(scale));  // 1 / scale
      }
#pragma unroll
      for (int term = 0; term < 3; ++term) {
        T* const to = terms + 8 * kRouter * kDepth * term + tile_at<kDepth>(row, k / 8) + k % 8;
        if constexpr (kCut == 1) {
          const T v = from_acc<T>(w[0]);
          *to = v;
          w[0] -= to_acc(v);
        } else {
          uint32_t pairs[kCut / 2];
#pragma unroll
          for (int j = 0; j < kCut / 2; ++j) {
            pairs[j] = pack2<T>(w[2 * j], w[2 * j + 1]);
            const float2 taken = unpack2<T>(pairs[j]);
            w[2 * j] -= taken.x;
            w[2 * j + 1] -= taken.y;
          }
          if constexpr (kCut == 4) {
            *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
          } else {
            *reinterpret_cast<uint32_t*>(to) = pairs[0];
          }
        }
      }
    }
  }
};

}  // namespace moa
