// The arithmetic of one instruction set, seen by the micro-kernels as a struct of static functions.
//
//   In      element that is multiplied          kIn    elements in one loaded vector
//   Acc     element that is accumulated         kAcc   lanes of one accumulator
//   kPack   products summed into a lane by one multiply-add: 1, or 2 for bfloat16 pairs
//   kLinearTokens   up to how many tokens a product with W is faster here than in most GEMMs (plan.h)
//   kTiles  whether whole tiles are multiplied at once (lora/tiles.h), what is left over as in the struct it derives from
//   kPanels whether rows can be multiplied by a panel (lora/panel.h)
//   kStrips whether they stand in strips as wide as a tile, as other operands then do
//   kPacks  whether a product with W of many tokens may be our own (plan::packs)
//   kTerms  whether float32 is multiplied as terms of bfloat16 there (lora/terms.h)
//   kWidens whether load takes elements of 16 bits too
//   kDotM x kDotN, kAxpyM x kAxpyN   register tiles that leave room for their operands
//
// Included only by csrc/isa/kernels.cpp, once per instruction set, inside that set's own namespace: the linker must
// never be able to pick an AVX-512 copy of a function for a machine without it.
#pragma once
#include "common/types.h"

#if defined(MOA_HAS_AVX2)
#include <immintrin.h>
#endif

#define MOA_UNROLL _Pragma("GCC unroll 8")
#define MOA_UNROLL_4 _Pragma("GCC unroll 4")
#define MOA_UNROLL_16 _Pragma("GCC unroll 16")

namespace moa {
namespace MOA_ISA {

// ---- plain C++: any machine, and float64 on every machine. The compiler vectorises the loops. -------------------
template <class T, int W, int M, int N, int AM, int AN>
struct Plain {
  using In = T;
  using Acc = T;
  struct InVec {
    T v[W];
  };
  using AccVec = InVec;
  static constexpr bool kTiles = false, kPanels = false, kStrips = false, kPacks = false, kTerms = false,
                        kWidens = false;
  static constexpr int kIn = W, kAcc = W, kPack = 1, kDotM = M, kDotN = N, kAxpyM = AM, kAxpyN = AN, kLinearTokens = 0;

  static inline InVec load(const T* p) {
    InVec r;
    for (int i = 0; i < W; ++i) r.v[i] = p[i];
    return r;
  }
  static inline InVec load_n(const T* p, int n) {
    InVec r;
    for (int i = 0; i < W; ++i) r.v[i] = i < n ? p[i] : T(0);
    return r;
  }
  static inline InVec splat(const T* p) {
    InVec r;
    for (int i = 0; i < W; ++i) r.v[i] = *p;
    return r;
  }
  static inline AccVec zero() {
    AccVec r;
    for (int i = 0; i < W; ++i) r.v[i] = T(0);
    return r;
  }
  static inline AccVec load_acc(const T* p) { return load(p); }
  static inline AccVec load_acc_n(const T* p, int n) { return load_n(p, n); }
  static inline void store_acc(T* p, const AccVec& a) {
    for (int i = 0; i < W; ++i) p[i] = a.v[i];
  }
  static inline void store_acc_n(T* p, const AccVec& a, int n) {
    for (int i = 0; i < W; ++i)
      if (i < n) p[i] = a.v[i];
  }
  static inline AccVec fma(const InVec& a, const InVec& b, const AccVec& c) {
    AccVec r;
    for (int i = 0; i < W; ++i) r.v[i] = c.v[i] + a.v[i] * b.v[i];
    return r;
  }
  // Sums the lanes of four accumulators. Every dot product ends here, so its value cannot depend on its tile.
  static inline void reduce4(const AccVec& a, const AccVec& b, const AccVec& c, const AccVec& d, T* out) {
    const AccVec* s[4] = {&a, &b, &c, &d};
    for (int j = 0; j < 4; ++j) {
      T t[W];
      for (int i = 0; i < W; ++i) t[i] = s[j]->v[i];
      for (int step = W / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) t[i] += t[i + step];
      out[j] = t[0];
    }
  }
};
using F64 = Plain<double, 8, 3, 4, 4, 2>;

#if !defined(MOA_HAS_AVX2)
using F32 = Plain<float, 8, 3, 2, 3, 2>;
#elif !defined(MOA_HAS_AVX512)

// ---- AVX2 + FMA: 16 registers of 8 floats ------------------------------------------------------------------------
struct F32 {
  using In = float;
  using Acc = float;
  using InVec = __m256;
  using AccVec = __m256;
  static constexpr bool kTiles = false, kPanels = true, kStrips = true, kPacks = true, kTerms = false, kWidens = true;
  static constexpr int kIn = 8, kAcc = 8, kPack = 1, kDotM = 3, kDotN = 4, kAxpyM = 4, kAxpyN = 3, kLinearTokens = 32;

  static inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static inline InVec load(const float* p) { return _mm256_loadu_ps(p); }
  static inline InVec load(const bf16_t* p) {  // widened on the way
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static inline InVec load(const f16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline InVec load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  template <class T>
  static inline InVec load_n(const T* p, int n) {
    T some[kIn] = {};
    memcpy(some, p, n * sizeof(T));
    return load(some);
  }
  static inline InVec splat(const float* p) { return _mm256_broadcast_ss(p); }
  static inline AccVec zero() { return _mm256_setzero_ps(); }
  static inline AccVec add(AccVec a, AccVec b) { return _mm256_add_ps(a, b); }
  static inline AccVec load_acc(const float* p) { return _mm256_loadu_ps(p); }
  static inline AccVec load_acc_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static inline void store_acc(float* p, AccVec a) { _mm256_storeu_ps(p, a); }
  static inline void store_acc_n(float* p, AccVec a, int n) { _mm256_maskstore_ps(p, first(n), a); }
  // By its own name: around the intrinsic GCC 12 copies accumulators, and spills some where all registers are in use.
  static inline AccVec fma(InVec a, InVec b, AccVec c) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
  }
  static inline void reduce4(AccVec a, AccVec b, AccVec c, AccVec d, float* out) {
    const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
  }
};
#else

// ---- AVX-512: 32 registers of 16 floats ----------------------------------------------------------------------------
struct Acc512 {
  using Acc = float;
  using AccVec = __m512;
  static constexpr bool kTiles = false, kPanels = false, kStrips = false, kPacks = false, kTerms = false,
                        kWidens = false;
  static constexpr int kAcc = 16, kDotM = 6, kDotN = 4, kAxpyM = 6, kAxpyN = 4;

  static inline AccVec zero() { return _mm512_setzero_ps(); }
  static inline AccVec add(AccVec a, AccVec b) { return _mm512_add_ps(a, b); }
  static inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static inline AccVec load_acc(const float* p) { return _mm512_loadu_ps(p); }
  static inline AccVec load_acc_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static inline void store_acc(float* p, AccVec a) { _mm512_storeu_ps(p, a); }
  static inline void store_acc_n(float* p, AccVec a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
  static inline void reduce4(AccVec a, AccVec b, AccVec c, AccVec d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 t = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    const __m256 u = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1)));
  }
};
struct F32 : Acc512 {
  using In = float;
  using InVec = __m512;
  static constexpr bool kPanels = true, kPacks = true, kWidens = true;
#if defined(MOA_HAS_AMX_BF16)
  static constexpr bool kTerms = true;
#endif
  static constexpr int kIn = 16, kPack = 1, kLinearTokens = 192;

  static inline InVec load(const float* p) { return _mm512_loadu_ps(p); }
  static inline InVec load(const bf16_t* p) {  // widened on the way
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static inline InVec load(const f16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline InVec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  template <class T>
  static inline InVec load_n(const T* p, int n) {
    T some[kIn] = {};
    memcpy(some, p, n * sizeof(T));
    return load(some);
  }
  static inline InVec splat(const float* p) { return _mm512_set1_ps(*p); }
  static inline AccVec fma(InVec a, InVec b, AccVec c) { return _mm512_fmadd_ps(a, b, c); }
};
#if defined(MOA_HAS_AVX512_BF16)
// vdpbf16ps: each lane adds the products of one pair of bfloat16.
struct BF16 : Acc512 {
  using In = bf16_t;
  using InVec = __m512i;
  static constexpr int kIn = 32, kPack = 2, kLinearTokens = 32;

  static inline InVec load(const bf16_t* p) { return _mm512_loadu_si512(p); }
  static inline InVec load_n(const bf16_t* p, int n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static inline InVec splat(const bf16_t* p) {  // one pair to all lanes
    int pair;
    memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static inline AccVec fma(InVec a, InVec b, AccVec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#if defined(MOA_HAS_AMX_BF16)
struct BF16Tiles : BF16 {
  static constexpr bool kTiles = true;
  static constexpr int kAxpyM = 16;
};
#endif
#endif
#endif

}  // namespace MOA_ISA
}  // namespace moa
