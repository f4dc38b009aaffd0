// Rows turned over, or taken in pairs, into the layout that a tile of micro.h wants. Included only by micro.h.
#pragma once
#include "common/convert.h"

namespace moa {
namespace MOA_ISA {

#if defined(MOA_HAS_AVX512)
// 16 rows of four 32-bit units, or `rows` of them, through registers: each takes the four units of rows i, i + 4, i + 8
// and i + 12 from memory, so that only the squares in its lanes are left to turn over.
template <bool Whole>
static inline void turn_16x4(const uint32_t* src, int64_t lds, int rows, __m512i* turned) {
  auto four = [&](int row) {
    return Whole || row < rows ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + row * lds))
                               : _mm_setzero_si128();
  };
  __m512i r[4];
  MOA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(four(i)), four(i + 4), 1);
    r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], four(i + 8), 2), four(i + 12), 3);
  }
  const __m512i lo[2] = {_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpacklo_epi32(r[2], r[3])};
  const __m512i hi[2] = {_mm512_unpackhi_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[2], r[3])};
  turned[0] = _mm512_unpacklo_epi64(lo[0], lo[1]);
  turned[1] = _mm512_unpackhi_epi64(lo[0], lo[1]);
  turned[2] = _mm512_unpacklo_epi64(hi[0], hi[1]);
  turned[3] = _mm512_unpackhi_epi64(hi[0], hi[1]);
}
template <bool Whole>
static inline void transpose_16x4(const uint32_t* src, int64_t lds, int rows, uint32_t* dst, int64_t ldd) {
  __m512i turned[4];
  turn_16x4<Whole>(src, lds, rows, turned);
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
  MOA_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (Whole) {
      _mm512_storeu_si512(dst + i * ldd, turned[i]);
    } else {
      _mm512_mask_storeu_epi32(dst + i * ldd, mask, turned[i]);
    }
  }
}
#elif defined(MOA_HAS_AVX2)
// Eight rows of eight 32-bit units through registers: each takes half of rows i and i + 4, so that only the squares in
// its lanes are left to turn over.
static inline void transpose_8x8(const float* src, int64_t lds, float* dst, int64_t ldd) {
  __m256 r[8];
  MOA_UNROLL
  for (int i = 0; i < 8; ++i) {
    const float* from = src + i % 4 * lds + i / 4 * 4;
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 4 * lds), 1);
  }
  MOA_UNROLL
  for (int i = 0; i < 8; i += 4) {
    const __m256d lo[2] = {_mm256_castps_pd(_mm256_unpacklo_ps(r[i], r[i + 1])),
                           _mm256_castps_pd(_mm256_unpacklo_ps(r[i + 2], r[i + 3]))};
    const __m256d hi[2] = {_mm256_castps_pd(_mm256_unpackhi_ps(r[i], r[i + 1])),
                           _mm256_castps_pd(_mm256_unpackhi_ps(r[i + 2], r[i + 3]))};
    _mm256_storeu_ps(dst + i * ldd, _mm256_castpd_ps(_mm256_unpacklo_pd(lo[0], lo[1])));
    _mm256_storeu_ps(dst + (i + 1) * ldd, _mm256_castpd_ps(_mm256_unpackhi_pd(lo[0], lo[1])));
    _mm256_storeu_ps(dst + (i + 2) * ldd, _mm256_castpd_ps(_mm256_unpacklo_pd(hi[0], hi[1])));
    _mm256_storeu_ps(dst + (i + 3) * ldd, _mm256_castpd_ps(_mm256_unpackhi_pd(hi[0], hi[1])));
  }
}
#endif

// dst[i][j] = src[j][i]: src is `rows` x `cols`, dst `cols` x `rows` with leading dimension ldd. Units of U, which may be
// pairs of bfloat16 at addresses of bfloat16.
template <class U>
static inline void transpose_plain(const U* src, int64_t lds, int64_t rows, int64_t cols, U* dst, int64_t ldd) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t i = 0; i < cols; ++i) memcpy(dst + i * ldd + j, src + j * lds + i, sizeof(U));
}

#if defined(MOA_HAS_AVX512)
static inline void transpose(const uint32_t* src, int64_t lds, int64_t rows, int64_t cols, uint32_t* dst, int64_t ldd) {
  const int64_t quads = cols / 4 * 4;
  for (int64_t j = 0; j < rows; j += 16) {
    const int here = static_cast<int>(rows - j < 16 ? rows - j : 16);
    const uint32_t* from = src + j * lds;
    if (here == 16) {
      // The next sixteen rows are asked for line after line, which the columns across them do not do.
      const char* const soon = reinterpret_cast<const char*>(from + 16 * lds);
      const bool more = lds == cols && j + 16 < rows;
      for (int64_t i = 0; i < quads; i += 4) {
        if (more) {
          MOA_UNROLL
          for (int64_t n = 0; n < 4; ++n) __builtin_prefetch(soon + (i + n) * 64);
        }
        transpose_16x4<true>(from + i, lds, 16, dst + i * ldd + j, ldd);
      }
    } else {
      for (int64_t i = 0; i < quads; i += 4) transpose_16x4<false>(from + i, lds, here, dst + i * ldd + j, ldd);
    }
    transpose_plain(from + quads, lds, here, cols - quads, dst + quads * ldd + j, ldd);
  }
}
#elif defined(MOA_HAS_AVX2)
static inline void transpose(const uint32_t* src, int64_t lds, int64_t rows, int64_t cols, uint32_t* dst, int64_t ldd) {
  const int64_t whole = cols / 8 * 8;
  int64_t j = 0;
  for (; j + 8 <= rows; j += 8) {
    const uint32_t* from = src + j * lds;
    for (int64_t i = 0; i < whole; i += 8)
      transpose_8x8(reinterpret_cast<const float*>(from + i), lds, reinterpret_cast<float*>(dst + i * ldd + j), ldd);
    transpose_plain(from + whole, lds, 8, cols - whole, dst + whole * ldd + j, ldd);
  }
  transpose_plain(src + j * lds, lds, rows - j, cols, dst + j, ldd);
}
#else
static inline void transpose(const uint32_t* src, int64_t lds, int64_t rows, int64_t cols, uint32_t* dst, int64_t ldd) {
  for (int64_t j = 0; j < rows; j += 16)  // blocks of 16 rows keep the written lines in L1
    transpose_plain(src + j * lds, lds, rows - j < 16 ? rows - j : 16, cols, dst + j, ldd);
}
#endif
static inline void transpose(const float* src, int64_t lds, int64_t rows, int64_t cols, float* dst, int64_t ldd) {
  transpose(reinterpret_cast<const uint32_t*>(src), lds, rows, cols, reinterpret_cast<uint32_t*>(dst), ldd);
}
static inline void transpose(const double* src, int64_t lds, int64_t rows, int64_t cols, double* dst, int64_t ldd) {
  transpose_plain(src, lds, rows, cols, dst, ldd);
}

// Pairs for kPack == 2: dst = a0 b0 a1 b1 ...; a null b counts as zeros.
static inline void interleave(const bf16_t* a, const bf16_t* b, int64_t n, bf16_t* dst) {
  int64_t i = 0;
#if defined(MOA_HAS_AVX512_BF16)
  for (; i + 16 <= n; i += 16) {
    const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)));
    const __m256i bits =
        b != nullptr ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)) : _mm256_setzero_si256();
    _mm512_storeu_si512(dst + 2 * i, _mm512_or_si512(lo, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
  }
#endif
  for (; i < n; ++i) {
    dst[2 * i] = a[i];
    dst[2 * i + 1] = b != nullptr ? b[i] : bf16_t{0};
  }
}

// dst[j][i] = src[i][j] for `cols` <= 16 columns of 16-bit elements, through pairs of columns as 32-bit units.
static inline void transpose(const bf16_t* src, int64_t lds, int64_t rows, int64_t cols, bf16_t* dst, int64_t ldd) {
  int64_t i = 0;
#if defined(MOA_HAS_AVX512_BF16)
  for (; i + 16 <= rows; i += 16) {
    for (int64_t j = 0; j < cols; j += 16) {
      const int n = static_cast<int>(cols - j < 16 ? cols - j : 16);
      uint32_t units[16 * 8], turned[8 * 16];
      const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
      for (int k = 0; k < 16; ++k)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(units + k * 8),
                            _mm256_maskz_loadu_epi16(mask, src + (i + k) * lds + j));
      for (int k = 0; k < 8; k += 4) transpose_16x4<true>(units + k, 8, 16, turned + k * 16, 16);
      for (int k = 0; k < n; ++k) {
        const __m512i pair = _mm512_loadu_si512(turned + k / 2 * 16);
        const __m256i half = _mm512_cvtepi32_epi16(k % 2 == 0 ? pair : _mm512_srli_epi32(pair, 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + (j + k) * ldd + i), half);
      }
    }
  }
#endif
  if (i < rows) transpose_plain(src + i * lds, lds, rows - i, cols, dst + i, ldd);
}

}  // namespace MOA_ISA
}  // namespace moa
