// Rows between storage types (float, double, bfloat16, float16) and the element a micro-kernel multiplies.
// Included only by csrc/isa/kernels.cpp, inside one instruction set's namespace (see common/vec.h).
#pragma once
#include "common/vec.h"

namespace moa {
namespace MOA_ISA {

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

inline float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// One element.
inline float to_acc(float v) { return v; }
inline double to_acc(double v) { return v; }
inline float to_acc(bf16_t v) { return as_float(uint32_t{v.bits} << 16); }
inline float to_acc(f16_t v) {
#if defined(MOA_HAS_AVX2)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  // Scaling by 2^112 moves the exponent's bias and makes subnormals normal, exactly.
  return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000u)));
#endif
}

inline void from_acc(float v, float* out) { *out = v; }
inline void from_acc(double v, double* out) { *out = v; }
inline void from_acc(double v, float* out) { *out = static_cast<float>(v); }
inline void from_acc(float v, double* out) { *out = v; }
inline void from_acc(float v, bf16_t* out) {  // round to nearest, ties to even
  const uint32_t u = as_bits(v);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out->bits =
      nan ? static_cast<uint16_t>(u >> 16 | 0x40u) : static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void from_acc(float v, f16_t* out) {
#if defined(MOA_HAS_AVX2)
  out->bits = static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const uint32_t u = as_bits(v), sign = u >> 16 & 0x8000u, mag = u & 0x7fffffffu;
  uint32_t h;
  if (mag > 0x7f800000u) {
    h = 0x7e00u;  // NaN
  } else if (mag >= 0x477ff000u) {
    h = 0x7c00u;  // rounds past the largest float16
  } else if (mag < 0x38800000u) {
    h = as_bits(as_float(mag) + 0.5f) - 0x3f000000u;  // subnormal: the adder at 0.5 rounds at 2^-24
  } else {
    h = (mag - 0x38000000u + 0xfffu + (mag >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | h);
#endif
}

// Rows. The plain loops vectorise; the two half types have instructions of their own.
template <class S, class D>
inline void convert_row(const S* src, D* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_acc(to_acc(src[i]), dst + i);
}
#if defined(MOA_HAS_AVX512_BF16)
inline void convert_row(const float* src, bf16_t* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(src + i))));
  for (; i < n; ++i) from_acc(src[i], dst + i);
}
#endif
#if defined(MOA_HAS_AVX512)
inline void convert_row(const bf16_t* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
    _mm512_storeu_si512(dst + i, _mm512_slli_epi32(w, 16));
  }
  for (; i < n; ++i) dst[i] = to_acc(src[i]);
}
inline void convert_row(const f16_t* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i))));
  for (; i < n; ++i) dst[i] = to_acc(src[i]);
}
inline void convert_row(const float* src, f16_t* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) from_acc(src[i], dst + i);
}
#elif defined(MOA_HAS_AVX2)
inline void convert_row(const f16_t* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  for (; i < n; ++i) dst[i] = to_acc(src[i]);
}
inline void convert_row(const float* src, f16_t* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) from_acc(src[i], dst + i);
}
#endif

// Adds a stored row to accumulators: dst[i] += src[i].
template <class S, class D>
inline void add_row(const S* src, D* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += to_acc(src[i]);
}

}  // namespace MOA_ISA
}  // namespace moa
