// What the tiles of shrink.cu and dense.cu are made of: rows of x times a panel, by one block.
//
//   c[m][n] = sum over k in [k0, k1) of row_m[k] panel_n[k]
//
// Rows are pointers, null for none, so that the caller gathers as it likes. What a panel lacks counts as zero, and
// nothing is read outside [k0, k1) or beyond the panel's rows. Two forms: tensor cores for 16-bit x (mma_tile.cuh),
// plain multiply-adds for float32 and float64 (simt_tile.cuh).
#pragma once
#include "common/device.cuh"
#include "lora/plan_cuda.h"

namespace moa {

struct Panel {
  const void* base;     // of x's type, or float where f32
  int64_t ld;           // elements from one row to the next; columns: from one k to the next
  int rows;             // n in [0, rows)
  bool columns;         // false: panel_n[k] = base[n ld + k]; true: base[k ld + n], or with `each` that of an expert:
  int64_t each, apart;  // of 8 ceil(each / 8) columns the first `each` are there; experts' bases are so far apart
  int64_t first;        // fragments of 8 columns before this panel, counted through the experts
  bool f32;             // float32 under 16-bit x: rounded to x's type as it is read
  bool direct;          // base and ld are whole 16-byte chunks
  const void* router;   // further rows in the accumulator's type, behind the others; or null
  int64_t router_ld;
  int router_rows;
  bool router_direct;  // as `direct`, of these
};

// A chunk of 16 bytes of shared memory from n elements (8 or more: all) at src; the rest zero. Where it can, the copy
// is asynchronous: cp_async_wait and a barrier deliver both kinds.
template <class T, class S>
__device__ __forceinline__ void stage_chunk(T* shared, const S* src, int64_t n, bool direct) {
  constexpr int kChunk = 16 / sizeof(T);
  if constexpr (std::is_same<T, S>::value) {
    if (direct && (n >= kChunk || n <= 0)) {
      cp_async_16(shared, src, n > 0);
      return;
    }
  }
  alignas(16) T v[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] = from_acc<T>(i < n ? to_acc(src[i]) : Acc<T>(0));
  *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(v);
}

// The power of two that brings a float16 term of `top` to 2^14 .. 2^15, so that three terms hold float32's bits; what is
// below 2^-112 stays below.
__device__ __forceinline__ float half_scale(float top) {
  const int exponent = static_cast<int>(__float_as_uint(top) >> 23);
  const int shift = exponent > 15 ? 127 + 14 - exponent : 0;
  return __uint_as_float(static_cast<uint32_t>(127 + (shift < 127 ? shift : 126)) << 23);
}

// Where a 16-byte chunk of a row of kDepth 16-bit elements is in a stage; rows 8 apart have the same exchange.
template <int kDepth>
__device__ __forceinline__ unsigned tile_at(unsigned row, unsigned chunk) {
  return row * kDepth + ((chunk ^ (kDepth == 64 ? row & 7 : row / 2 & 3)) * 8);
}

__device__ __forceinline__ int64_t clamp(int64_t v, int64_t lo, int64_t hi) { return v < lo ? lo : v > hi ? hi : v; }
inline bool is_half(DType type) { return type == DType::bf16 || type == DType::f16; }
inline bool chunks(const void* base, int64_t ld, int64_t element) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && ld * element % 16 == 0;
}

}  // namespace moa
