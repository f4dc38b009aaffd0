// The two register tiles of micro.h for bfloat16 on AMX: a tile holds 16 rows of 64 bytes, and one instruction adds the
// products of 16 x 32 and 32 x 16 bfloat16 to 16 x 16 floats. Included only by micro.h.
//
// The second operand comes in pairs of depth, as vdpbf16ps has them too: [depth / 2][16 columns][2]. What is subnormal
// counts as zero.
#pragma once

namespace moa {
namespace MOA_ISA {

// Shapes of the eight tiles, in the layout of LDTILECFG; released at the end, so that the system has no tiles to save.
class TileShapes {
 public:
  TileShapes() { palette_[0] = 1; }
  ~TileShapes() { _tile_release(); }
  void set(int tile, int rows, int bytes) {
    memcpy(palette_ + 16 + 2 * tile, &bytes, 2);
    palette_[48 + tile] = static_cast<uint8_t>(rows);
  }
  void load() const { _tile_loadconfig(palette_); }

 private:
  alignas(64) uint8_t palette_[64] = {};
};

// ---- dot: out[m][n] = sum_k x_m[k] a_n[k] ------------------------------------------------------------------------
constexpr int64_t kTileDepth = 128;              // of the four products that are summed apart: one waits for no other
constexpr int64_t kTileChunk = 512;              // of x copied at a time: 16 rows of it, and as much of a, fit into L1
constexpr int64_t kTilePitch = kTileChunk + 32;  // an odd number of lines: rows do not share cache sets

// Sixteen bfloat16 as floats.
static inline __m512 widened(const bf16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n < 16 ? (1u << n) - 1 : 0xffff); }

// n <= 16 rows of a as pairs of depth, zeros from n and k_size on: dst[k / 2][16].
static inline void pack_pairs(const bf16_t* a, int64_t lda, int64_t n, int64_t k_size, uint32_t* dst) {
  const int64_t k_end = (k_size + kTileDepth - 1) / kTileDepth * kTileDepth, whole = k_size / 8 * 8;
  alignas(64) bf16_t rows[16 * 32];  // where rows or columns are missing
  int64_t k = 0;
  for (; n == 16 && lda % 2 == 0 && k < whole; k += 8)
    transpose_16x4<true>(reinterpret_cast<const uint32_t*>(a + k), lda / 2, 16, dst + k * 8, 16);
  while (k < k_end) {
    const int64_t here = k_end - k < 32 ? k_end - k : 32;
    const int64_t there = k_size - k < here ? (k_size > k ? k_size - k : 0) : here;
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << there) - 1);
    for (int64_t i = 0; i < 16; ++i)
      _mm512_store_si512(rows + i * 32,
                         i < n && there > 0 ? _mm512_maskz_loadu_epi16(mask, a + i * lda + k) : _mm512_setzero_si512());
    for (int64_t i = 0; i < here; i += 8)
      transpose_16x4<true>(reinterpret_cast<const uint32_t*>(rows + i), 16, 16, dst + (k + i) * 8, 16);
    k += here;
  }
}

// `count` columns from k on of a row of k_size, zeros behind its end.
static inline void copy_columns(const bf16_t* row, int64_t k, int64_t count, int64_t k_size, bf16_t* dst) {
  for (int64_t i = 0; i < count; i += 32) {
    const int64_t left = k_size - k - i, here = left < 0 ? 0 : left < 32 ? left : 32;
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << here) - 1);
    _mm512_storeu_si512(dst + i, _mm512_maskz_loadu_epi16(mask, row + (here > 0 ? k + i : 0)));
  }
}

static void dot_tiles(const bf16_t* const* x, int64_t m_size, int64_t m_ahead, const bf16_t* a, int64_t lda,
                      int64_t n_size, int64_t k_size, float* out, int64_t ldo) {
  const int64_t k_end = (k_size + kTileDepth - 1) / kTileDepth * kTileDepth, groups = (n_size + 15) / 16;
  uint32_t* packed = scratch<uint32_t>(Scratch::tiles, groups * k_end * 8);
  for (int64_t g = 0; g < groups; ++g)
    pack_pairs(a + g * 16 * lda, lda, n_size - g * 16 < 16 ? n_size - g * 16 : 16, k_size, packed + g * k_end * 8);
  alignas(64) bf16_t rows[16 * kTilePitch];
  alignas(64) float sums[4][16 * 16];
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16, 64);
  shapes.load();
  for (int64_t m = 0; m < m_size; m += 16) {
    const int64_t m_here = m_size - m < 16 ? m_size - m : 16;
    for (int64_t i = m_here; i < 16; ++i) memset(rows + i * kTilePitch, 0, kTileChunk * sizeof(bf16_t));
    for (int64_t g = 0; g < groups; ++g) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k0 = 0; k0 < k_end; k0 += kTileChunk) {
        const int64_t count = k_end - k0 < kTileChunk ? k_end - k0 : kTileChunk;
        for (int64_t i = 0; i < m_here; ++i) {
          copy_columns(x[m + i], k0, count, k_size, rows + i * kTilePitch);
          if (m + 16 + i < m_size + m_ahead)  // the next tile's
            for (int64_t k = k0; k < k0 + count && k < k_size; k += 32) __builtin_prefetch(x[m + 16 + i] + k, 0, 2);
        }
        const uint32_t* pairs = packed + (g * k_end + k0) * 8;
        for (int64_t k = 0; k < count; k += kTileDepth) {
          _tile_loadd(4, rows + k, kTilePitch * 2);
          _tile_loadd(5, pairs + k * 8, 64);
          _tile_dpbf16ps(0, 4, 5);
          _tile_loadd(6, rows + k + 32, kTilePitch * 2);
          _tile_loadd(7, pairs + k * 8 + 256, 64);
          _tile_dpbf16ps(1, 6, 7);
          _tile_loadd(4, rows + k + 64, kTilePitch * 2);
          _tile_loadd(5, pairs + k * 8 + 512, 64);
          _tile_dpbf16ps(2, 4, 5);
          _tile_loadd(6, rows + k + 96, kTilePitch * 2);
          _tile_loadd(7, pairs + k * 8 + 768, 64);
          _tile_dpbf16ps(3, 6, 7);
        }
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      const int64_t n_here = n_size - g * 16 < 16 ? n_size - g * 16 : 16;
      const __mmask16 mask = static_cast<__mmask16>((1u << n_here) - 1);
      for (int64_t i = 0; i < m_here; ++i) {
        const __m512 low = _mm512_add_ps(_mm512_load_ps(sums[0] + i * 16), _mm512_load_ps(sums[1] + i * 16));
        const __m512 high = _mm512_add_ps(_mm512_load_ps(sums[2] + i * 16), _mm512_load_ps(sums[3] + i * 16));
        _mm512_mask_storeu_ps(out + (m + i) * ldo + g * 16, mask, _mm512_add_ps(low, high));
      }
    }
  }
}

// ---- axpy: sums[m][0:64] = sum_k coef[m][k] panel_k[0:64] -----------------------------------------------------------
// The pairs of a row of coef lie side by side, the rows `ldc` elements apart; those of the panel `pitch` bytes apart.
// Tile numbers are literals, so whole steps of 16 pairs and what is left are written out, on tiles of their own shape.
static inline void load_strip_shapes(TileShapes* shapes, int rows, int64_t k_size) {
  const int rest = static_cast<int>(k_size % 16);
  for (int tile = 0; tile < 5; ++tile) shapes->set(tile, rows, 64);
  shapes->set(5, 16, 64);
  shapes->set(6, rest > 0 ? rows : 0, 4 * rest);
  shapes->set(7, rest, rest > 0 ? 64 : 0);
  shapes->load();
}
static inline void strip_product(const bf16_t* coef, int64_t ldc, const bf16_t* panel, int64_t pitch, int64_t k_size,
                                 float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < k_size / 16; ++k, coef += 32, panel += 8 * pitch) {
    _tile_loadd(4, coef, ldc * 2);
    _tile_loadd(5, panel, pitch);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, panel + 32, pitch);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(5, panel + 64, pitch);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(5, panel + 96, pitch);
    _tile_dpbf16ps(3, 4, 5);
  }
  if (k_size % 16 > 0) {
    _tile_loadd(6, coef, ldc * 2);
    _tile_loadd(7, panel, pitch);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(7, panel + 32, pitch);
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(7, panel + 64, pitch);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(7, panel + 96, pitch);
    _tile_dpbf16ps(3, 6, 7);
  }
  _tile_stored(0, sums, 256);
  _tile_stored(1, sums + 16, 256);
  _tile_stored(2, sums + 32, 256);
  _tile_stored(3, sums + 48, 256);
}

// The bytes between two rows of a panel, which are one distance apart.
static inline int64_t panel_pitch(const bf16_t* const* panel, int64_t k_size) {
  return k_size > 1 ? (panel[1] - panel[0]) * 2 : 64;
}

// to_m[:] = from_m[:] + sum_k coef[m][k] panel_k[:], m <= 16 rows. Returns how many columns it did: whole strips.
static int64_t axpy_tiles(int m, const float* const* from, float* const* to, const bf16_t* coef, int64_t ldc,
                          const bf16_t* const* panel, int64_t k_size, int64_t width) {
  const int64_t pitch = panel_pitch(panel, k_size);
  TileShapes shapes;
  load_strip_shapes(&shapes, m, k_size);
  alignas(64) float sums[16 * 64];
  int64_t col = 0;
  for (; col + 64 <= width; col += 64) {
    strip_product(coef, ldc, panel[0] + 2 * col, pitch, k_size, sums);
    for (int i = 0; i < m; ++i)
      for (int n = 0; n < 64; n += 16)
        _mm512_storeu_ps(to[i] + col + n,
                         _mm512_add_ps(_mm512_loadu_ps(from[i] + col + n), _mm512_load_ps(sums + i * 64 + n)));
  }
  return col;
}

}  // namespace MOA_ISA
}  // namespace moa
