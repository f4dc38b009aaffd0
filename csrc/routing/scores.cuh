// What selection and its gradient share: logits of any dtype in the accumulator's type, their order, their scores.
#pragma once
#include <cmath>

#include "common/device.cuh"
#include "routing/routing.h"

namespace moa {

// Order-preserving integer of a number: NaN above +inf, -0 equal to +0. No number has the lowest integer.
__device__ __forceinline__ int32_t order_key(float v) {
  const float a = v + 0.0f;
  const int32_t bits = __float_as_int(a);
  return a != a ? 0x7fffffff : bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ int64_t order_key(double v) {
  const double a = v + 0.0;
  const int64_t bits = __double_as_longlong(a);
  return a != a ? 0x7fffffffffffffffLL : bits ^ ((bits >> 63) & 0x7fffffffffffffffLL);
}

// The number of a key; of NaN and -0 one that acts alike.
__device__ __forceinline__ float number_of(int32_t key) { return __int_as_float(key ^ ((key >> 31) & 0x7fffffff)); }

__device__ __forceinline__ float exp_acc(float v) { return expf(v); }
__device__ __forceinline__ double exp_acc(double v) { return exp(v); }
template <class A>
__device__ __forceinline__ A sigmoid(A z) {
  return A(1) / (A(1) + exp_acc(-z));
}
template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -static_cast<A>(INFINITY);
}

// f(row) with the row's element type. The branch is the same for every thread, and outside of f's loops.
template <class A, class F>
__device__ __forceinline__ void with_row(DType type, const void* logits, int64_t offset, const F& f) {
  if constexpr (std::is_same<A, double>::value) {
    f(static_cast<const double*>(logits) + offset);
  } else if (type == DType::f32) {
    f(static_cast<const float*>(logits) + offset);
  } else if (type == DType::bf16) {
    f(static_cast<const __nv_bfloat16*>(logits) + offset);
  } else {
    f(static_cast<const __half*>(logits) + offset);
  }
}
// One logit.
template <class A>
__device__ __forceinline__ A logit_at(DType type, const void* logits, int64_t at) {
  A z;
  with_row<A>(type, logits, at, [&](auto* row) { z = to_acc(row[0]); });
  return z;
}

}  // namespace moa
