// AVX-512 intrinsics, as far as csrc uses them, on a machine that has AVX2: what Intel's manual says of each, lane by lane.
// Included in front of csrc/isa/kernels.cpp (make isa-check), whose source stays as it is. A mistake that the processor
// would answer with a fault (an address that is not aligned) or with anything it likes (lanes that are undefined) stops
// here, or gives NaN.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

// The instruction set that is compiled for: 1 AVX-512, 2 with bfloat16, 3 with AMX.
#if !defined(MOA_EMULATE)
#error "MOA_EMULATE says which instruction set"
#endif
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if MOA_EMULATE >= 2
#define __AVX512BF16__ 1
#endif

namespace isa_emulator {
namespace {

// A register as lanes of one type, and back.
template <class T, int kBytes = 64>
struct Lanes {
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(T));
  T v[kCount];

  Lanes() = default;
  template <class Register>
  explicit Lanes(const Register& r) {
    static_assert(sizeof(Register) == kBytes, "a register of this width");
    memcpy(v, &r, kBytes);
  }
  template <class Register>
  Register as() const {
    static_assert(sizeof(Register) == kBytes, "a register of this width");
    Register r;
    memcpy(&r, v, kBytes);
    return r;
  }
};

template <class T, class Register, class F>
inline Register each(const F& f) {
  Lanes<T, sizeof(Register)> r;
  for (int i = 0; i < r.kCount; ++i) r.v[i] = f(i);
  return r.template as<Register>();
}
// Bit i: f(i).
template <int kCount, class F>
inline uint32_t bits(const F& f) {
  uint32_t mask = 0;
  for (int i = 0; i < kCount; ++i) mask |= static_cast<uint32_t>(f(i) ? 1 : 0) << i;
  return mask;
}

template <class Register>
inline Register load(const void* p, size_t aligned = 1) {
  if (reinterpret_cast<uintptr_t>(p) % aligned != 0) __builtin_trap();
  Register r;
  memcpy(&r, p, sizeof r);
  return r;
}
template <class Register>
inline void store(void* p, const Register& r, size_t aligned = 1) {
  if (reinterpret_cast<uintptr_t>(p) % aligned != 0) __builtin_trap();
  memcpy(p, &r, sizeof r);
}
// Memory behind a lane that the mask leaves out is not touched.
template <class T, class Register>
inline Register masked_load(const Register& otherwise, uint32_t mask, const void* p) {
  const Lanes<T, sizeof(Register)> other(otherwise);
  return each<T, Register>([&](int i) {
    T v = other.v[i];
    if (mask >> i & 1) memcpy(&v, static_cast<const char*>(p) + i * sizeof(T), sizeof v);
    return v;
  });
}
template <class T, class Register>
inline void masked_store(void* p, uint32_t mask, const Register& r) {
  const Lanes<T, sizeof(Register)> lanes(r);
  for (int i = 0; i < lanes.kCount; ++i)
    if (mask >> i & 1) memcpy(static_cast<char*>(p) + i * sizeof(T), &lanes.v[i], sizeof(T));
}

// a where the mask has the lane, else the other.
template <class T, class Register>
inline Register chosen(uint32_t mask, const Register& a, const Register& other) {
  const Lanes<T, sizeof(Register)> x(a), y(other);
  return each<T, Register>([&](int i) { return (mask >> i & 1) != 0 ? x.v[i] : y.v[i]; });
}

// In every 128 bits the low, or the high, half of both, in turns.
template <class T, class Register>
inline Register unpack(const Register& a, const Register& b, bool high) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(T));
  const Lanes<T> x(a), y(b);
  return each<T, Register>([&](int i) {
    const int from = i / kEach * kEach + (high ? kEach / 2 : 0) + i % kEach / 2;
    return i % 2 == 0 ? x.v[from] : y.v[from];
  });
}

// bfloat16: what is subnormal counts as zero, and becomes zero.
inline float flushed(float v) {
  return v != 0.0f && v > -std::numeric_limits<float>::min() && v < std::numeric_limits<float>::min()
             ? __builtin_copysignf(0.0f, v)
             : v;
}
inline float widened(uint16_t b) {
  const uint32_t u = uint32_t{b} << 16;
  float f;
  memcpy(&f, &u, 4);
  return flushed(f);
}
inline uint16_t narrowed(float v) {
  const float f = flushed(v);
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float added(float sum, uint16_t a, uint16_t b) { return flushed(__builtin_fmaf(widened(a), widened(b), sum)); }

// ---- float32 ----

inline __m512 setzero_ps() { return __m512{}; }
inline __m512 set1_ps(float v) {
  return each<float, __m512>([&](int) { return v; });
}
inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Lanes<float> x(a), y(b), z(c);
  Lanes<float> r;
  for (int i = 0; i < 16; i += 8)
    _mm256_storeu_ps(r.v + i,
                     _mm256_fmadd_ps(_mm256_loadu_ps(x.v + i), _mm256_loadu_ps(y.v + i), _mm256_loadu_ps(z.v + i)));
  return r.as<__m512>();
}
inline __m256 extractf32x8_ps(__m512 a, int half) {
  const Lanes<float> x(a);
  return each<float, __m256>([&](int i) { return x.v[8 * half + i]; });
}
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int how) {
  if (how != _CMP_ORD_Q) __builtin_trap();
  const Lanes<float> x(a), y(b);
  return static_cast<__mmask16>(bits<16>([&](int i) { return x.v[i] == x.v[i] && y.v[i] == y.v[i]; }));
}
inline __m512 cvtph_ps(__m256i a) {
  Lanes<float> r;
  const Lanes<uint16_t, 32> x(a);
  for (int i = 0; i < 16; i += 8) _mm256_storeu_ps(r.v + i, _mm256_cvtph_ps(load<__m128i>(x.v + i)));
  return r.as<__m512>();
}
inline __m256i cvtps_ph(__m512 a, int how) {
  if (how != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  Lanes<uint16_t, 32> r;
  const Lanes<float> x(a);
  for (int i = 0; i < 16; i += 8) store(r.v + i, _mm256_cvtps_ph(_mm256_loadu_ps(x.v + i), _MM_FROUND_TO_NEAREST_INT));
  return r.as<__m256i>();
}

// ---- integers ----

inline __m512i setzero_si512() { return __m512i{}; }
inline __m512i set1_epi32(int v) {
  return each<int32_t, __m512i>([&](int) { return v; });
}
inline __m512i set1_epi16(int v) {
  return each<int16_t, __m512i>([&](int) { return static_cast<int16_t>(v); });
}
template <class... V>
inline __m512i setr_epi32(V... v) {
  const int32_t lanes[] = {v...};
  static_assert(sizeof lanes == 64, "16 lanes");
  return load<__m512i>(lanes);
}
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i add_epi32(__m512i a, __m512i b) {
  const Lanes<uint32_t> x(a), y(b);
  return each<uint32_t, __m512i>([&](int i) { return x.v[i] + y.v[i]; });
}
inline __m512i max_epi32(__m512i a, __m512i b) {
  const Lanes<int32_t> x(a), y(b);
  return each<int32_t, __m512i>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
inline __m512i slli_epi32(__m512i a, int n) {
  const Lanes<uint32_t> x(a);
  return each<uint32_t, __m512i>([&](int i) { return n < 32 ? x.v[i] << n : 0; });
}
inline __m512i srli_epi32(__m512i a, int n) {
  const Lanes<uint32_t> x(a);
  return each<uint32_t, __m512i>([&](int i) { return n < 32 ? x.v[i] >> n : 0; });
}
inline __mmask16 cmpgt_epi32_mask(__m512i a, __m512i b) {
  const Lanes<int32_t> x(a), y(b);
  return static_cast<__mmask16>(bits<16>([&](int i) { return x.v[i] > y.v[i]; }));
}
inline __mmask16 cmpeq_epi32_mask(__m512i a, __m512i b) {
  const Lanes<int32_t> x(a), y(b);
  return static_cast<__mmask16>(bits<16>([&](int i) { return x.v[i] == y.v[i]; }));
}
inline __mmask32 cmpeq_epi16_mask(__m512i a, __m512i b) {
  const Lanes<int16_t> x(a), y(b);
  return bits<32>([&](int i) { return x.v[i] == y.v[i]; });
}
inline int mask_reduce_min_epi32(__mmask16 mask, __m512i a) {
  const Lanes<int32_t> x(a);
  int least = std::numeric_limits<int>::max();
  for (int i = 0; i < 16; ++i)
    if ((mask >> i & 1) != 0 && x.v[i] < least) least = x.v[i];
  return least;
}
inline int reduce_max_epi32(__m512i a) {
  const Lanes<int32_t> x(a);
  int most = x.v[0];
  for (int v : x.v) most = v > most ? v : most;
  return most;
}
inline __m512i inserti32x4(__m512i a, __m128i b, int quarter) {
  Lanes<int32_t> r(a);
  memcpy(r.v + 4 * quarter, &b, 16);
  return r.as<__m512i>();
}
inline __m512i castsi128_si512(__m128i a) {  // the rest is undefined
  return inserti32x4(set1_epi32(-1), a, 0);
}
inline __m512i cvtepu16_epi32(__m256i a) {
  const Lanes<uint16_t, 32> x(a);
  return each<uint32_t, __m512i>([&](int i) { return uint32_t{x.v[i]}; });
}
inline __m256i cvtepi32_epi16(__m512i a) {
  const Lanes<uint32_t> x(a);
  return each<uint16_t, __m256i>([&](int i) { return static_cast<uint16_t>(x.v[i]); });
}

// ---- bfloat16 ----

inline __m256bh cvtneps_pbh(__m512 a) {
  const Lanes<float> x(a);
  return each<uint16_t, __m256bh>([&](int i) { return narrowed(x.v[i]); });
}
inline __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {  // the odd one of a pair first
  const Lanes<float> sum(c);
  const Lanes<uint16_t> x(a), y(b);
  return each<float, __m512>(
      [&](int i) { return added(added(flushed(sum.v[i]), x.v[2 * i + 1], y.v[2 * i + 1]), x.v[2 * i], y.v[2 * i]); });
}

}  // namespace
}  // namespace isa_emulator

#define _mm512_setzero_ps isa_emulator::setzero_ps
#define _mm512_set1_ps isa_emulator::set1_ps
#define _mm512_add_ps isa_emulator::add_ps
#define _mm512_sub_ps isa_emulator::sub_ps
#define _mm512_fmadd_ps isa_emulator::fmadd_ps
#define _mm512_extractf32x8_ps(a, half) isa_emulator::extractf32x8_ps(a, half)
#define _mm512_cmp_ps_mask(a, b, how) isa_emulator::cmp_ps_mask(a, b, how)
#define _mm512_cvtph_ps isa_emulator::cvtph_ps
#define _mm512_cvtps_ph(a, how) isa_emulator::cvtps_ph(a, how)
#define _mm512_castps_pd(a) reinterpret_cast<__m512d>(a)
#define _mm512_castpd_ps(a) reinterpret_cast<__m512>(a)
#define _mm512_castps_si512(a) reinterpret_cast<__m512i>(a)
#define _mm512_castsi512_ps(a) reinterpret_cast<__m512>(a)
#define _mm512_castps512_ps256(a) isa_emulator::extractf32x8_ps(a, 0)
#define _mm512_unpacklo_ps(a, b) isa_emulator::unpack<float>(a, b, false)
#define _mm512_unpackhi_ps(a, b) isa_emulator::unpack<float>(a, b, true)
#define _mm512_unpacklo_pd(a, b) isa_emulator::unpack<double>(a, b, false)
#define _mm512_unpackhi_pd(a, b) isa_emulator::unpack<double>(a, b, true)
#define _mm512_unpacklo_epi32(a, b) isa_emulator::unpack<int32_t>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) isa_emulator::unpack<int32_t>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) isa_emulator::unpack<int64_t>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) isa_emulator::unpack<int64_t>(a, b, true)

#define _mm512_load_ps(p) isa_emulator::load<__m512>(p, 64)
#define _mm512_loadu_ps(p) isa_emulator::load<__m512>(p)
#define _mm512_loadu_si512(p) isa_emulator::load<__m512i>(p)
#define _mm512_storeu_ps(p, a) isa_emulator::store<__m512>(p, a)
#define _mm512_store_si512(p, a) isa_emulator::store<__m512i>(p, a, 64)
#define _mm512_storeu_si512(p, a) isa_emulator::store<__m512i>(p, a)
#define _mm512_maskz_loadu_ps(mask, p) isa_emulator::masked_load<float>(__m512{}, mask, p)
#define _mm512_maskz_loadu_epi16(mask, p) isa_emulator::masked_load<uint16_t>(__m512i{}, mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) isa_emulator::masked_load<uint16_t>(__m256i{}, mask, p)
#define _mm512_mask_loadu_epi32(other, mask, p) isa_emulator::masked_load<int32_t>(other, mask, p)
#define _mm512_mask_storeu_ps(p, mask, a) isa_emulator::masked_store<float>(p, mask, a)
#define _mm512_mask_storeu_epi32(p, mask, a) isa_emulator::masked_store<int32_t>(p, mask, a)
#define _mm256_mask_storeu_epi16(p, mask, a) isa_emulator::masked_store<uint16_t>(p, mask, a)
#define _mm512_maskz_mov_ps(mask, a) isa_emulator::chosen<float>(mask, a, __m512{})
#define _mm512_mask_mov_epi32(other, mask, a) isa_emulator::chosen<int32_t>(mask, a, other)

#define _mm512_setzero_si512 isa_emulator::setzero_si512
#define _mm512_set1_epi32 isa_emulator::set1_epi32
#define _mm512_set1_epi16 isa_emulator::set1_epi16
#undef _mm512_setr_epi32  // a macro in GCC
#define _mm512_setr_epi32 isa_emulator::setr_epi32
#define _mm512_and_si512 isa_emulator::and_si512
#define _mm512_or_si512 isa_emulator::or_si512
#define _mm512_add_epi32 isa_emulator::add_epi32
#define _mm512_max_epi32 isa_emulator::max_epi32
#define _mm512_slli_epi32(a, n) isa_emulator::slli_epi32(a, n)
#define _mm512_srli_epi32(a, n) isa_emulator::srli_epi32(a, n)
#define _mm512_cmpgt_epi32_mask(a, b) isa_emulator::cmpgt_epi32_mask(a, b)
#define _mm512_cmpeq_epi32_mask(a, b) isa_emulator::cmpeq_epi32_mask(a, b)
#define _mm512_cmpeq_epi16_mask(a, b) isa_emulator::cmpeq_epi16_mask(a, b)
#define _mm512_mask_reduce_min_epi32 isa_emulator::mask_reduce_min_epi32
#define _mm512_reduce_max_epi32 isa_emulator::reduce_max_epi32
#define _mm512_inserti32x4(a, b, quarter) isa_emulator::inserti32x4(a, b, quarter)
#define _mm512_castsi128_si512 isa_emulator::castsi128_si512
#define _mm512_cvtepu16_epi32 isa_emulator::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 isa_emulator::cvtepi32_epi16
#define _mm512_cvtneps_pbh isa_emulator::cvtneps_pbh
#define _mm512_dpbf16_ps isa_emulator::dpbf16_ps

#if MOA_EMULATE >= 3
#include "amx.h"
#endif
