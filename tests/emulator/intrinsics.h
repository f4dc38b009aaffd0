// CUDA's scalar device functions in plain C++: bits, rounding, cached loads, minimum and maximum.
#pragma once
#include <math.h>

#include <type_traits>

#include "emulator/types.h"

// The C library declares functions of these names, hence macros.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i;
    unsigned byte = static_cast<unsigned>(both >> 8 * (s & 7u)) & 0xffu;
    if (s & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    r |= byte << 8 * i;
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return static_cast<unsigned>((uint64_t{hi} << 32 | lo) << (n & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return static_cast<unsigned>((uint64_t{hi} << 32 | lo) >> (n & 31u));
}

inline int __float_as_int(float v) { return emu::bits<int>(v); }
inline unsigned __float_as_uint(float v) { return emu::bits<unsigned>(v); }
inline float __int_as_float(int v) { return emu::bits<float>(v); }
inline float __uint_as_float(unsigned v) { return emu::bits<float>(v); }
inline long long __double_as_longlong(double v) { return emu::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emu::bits<double>(v); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline int __float2int_rn(float v) { return static_cast<int>(rintf(v)); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }

// As CUDA's: the other one of a NaN and a number; signed and unsigned compare as unsigned.
template <class A, class B, class C = std::common_type_t<A, B>>
constexpr std::enable_if_t<std::is_arithmetic<C>::value, C> min(A a, B b) {
  return C(a) < C(b) || C(b) != C(b) ? C(a) : C(b);
}
template <class A, class B, class C = std::common_type_t<A, B>>
constexpr std::enable_if_t<std::is_arithmetic<C>::value, C> max(A a, B b) {
  return C(a) > C(b) || C(b) != C(b) ? C(a) : C(b);
}

#define MOA_LOAD(name)        \
  template <class T>          \
  inline T name(const T* p) { \
    return *p;                \
  }
MOA_LOAD(__ldg)
MOA_LOAD(__ldca)
MOA_LOAD(__ldcg)
MOA_LOAD(__ldcs)
MOA_LOAD(__ldlu)
#undef MOA_LOAD
#define MOA_STORE(name)         \
  template <class T>            \
  inline void name(T* p, T v) { \
    *p = v;                     \
  }
MOA_STORE(__stcg)
MOA_STORE(__stcs)
MOA_STORE(__stwb)
MOA_STORE(__stwt)
#undef MOA_STORE
