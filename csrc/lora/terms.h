// A float32 product on AMX's tiles for bfloat16, y += x w in float32's accuracy: every factor is the sum of three
// bfloat16, x = x_h + x_m + x_l without a remainder, and six of the nine products are added,
//
//   x_l w_h + x_h w_h + x_h w_l + x_h w_m + x_m w_m + x_m w_h,
//
// without those that are 2^-23 of the whole or less. The tiles do sixteen times the products of two float32 multiply-adds,
// so six of them leave more than twice; a tile rounds to float32 once in 32 products, so that sums are more accurate than
// MKL's (error / norm of 2048 products 1.9e-7 and 3.5e-7). Terms below 2^-126 count as zero. Included only by linear.h.
//
// x is split once, into panels of 32 rows and all depth; a task splits a block of w's columns for a run of depth, in
// strips of 32, and multiplies it by every panel. A step of 32 products holds, of panels and strips alike, two groups of
// 16 rows or columns, of each the three terms as they lie in a tile:
//
//   panel  [step][group][term][16 rows][16 pairs]
//   strip  [step][group][term][16 pairs][16 columns]
//
// where pair i is of products i and i + 16 of the step, so that two vectors of floats become a line without a shuffle.
// A row of x with an infinity or a NaN counts as zero here and is reported: an infinity has no terms. One in w becomes a
// NaN.
#pragma once

namespace moa {
namespace MOA_ISA {

constexpr int64_t kTermTile = 16 * 32, kTermGroup = 3 * kTermTile, kTermStep = 2 * kTermGroup;  // bfloat16 in each

// Of 16 floats the terms, each as the upper half of a float. The first is cut off, so that none becomes an infinity.
struct Terms {
  __m512i high, middle, low;
};
static inline Terms terms_of(__m512 v) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), half = _mm512_set1_epi32(0x8000);
  const __m512i high = _mm512_and_si512(_mm512_castps_si512(v), upper);
  const __m512 rest = _mm512_sub_ps(v, _mm512_castsi512_ps(high));
  const __m512i middle = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
  return {high, middle, _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(middle)))};
}

// Sixteen pairs, a line of each of a group's tiles.
static inline void store_pairs(__m512 first, __m512 second, bf16_t* to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  auto pairs = [&](__m512i a, __m512i b) {
    return _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, upper));
  };
  const Terms a = terms_of(first), b = terms_of(second);
  _mm512_storeu_si512(to, pairs(a.high, b.high));
  _mm512_storeu_si512(to + kTermTile, pairs(a.middle, b.middle));
  _mm512_storeu_si512(to + 2 * kTermTile, pairs(a.low, b.low));
}

// Rows [0, rows) of x, at most 16, as a group of a panel, the others zeros. finite[i]: whether row i is.
static void split_rows(const float* x, int64_t ldx, int64_t rows, int64_t depth, bf16_t* to, bool* finite) {
  for (int64_t i = 0; i < 16; ++i) {
    const float* row = x + i * ldx;
    bf16_t* line = to + i * 32;
    bool zero = i >= rows;
    if (!zero) {
      const __m512 zeros = _mm512_setzero_ps();
      __mmask16 ordered = 0xffff;  // v - v is a NaN for an infinity and a NaN
      for (int64_t k = 0; k < depth; k += 32) {
        const __m512 a = _mm512_maskz_loadu_ps(first_lanes(depth - k), row + k);
        const __m512 b = depth - k > 16 ? _mm512_maskz_loadu_ps(first_lanes(depth - k - 16), row + k + 16) : zeros;
        ordered &= _mm512_cmp_ps_mask(_mm512_sub_ps(a, a), _mm512_sub_ps(b, b), _CMP_ORD_Q);
        store_pairs(a, b, line + k / 32 * kTermStep);
      }
      finite[i] = ordered == 0xffff;
      zero = !finite[i];
    }
    for (int64_t k = 0; zero && k < depth; k += 32)
      for (int64_t term = 0; term < 3; ++term)
        _mm512_storeu_si512(line + k / 32 * kTermStep + term * kTermTile, _mm512_setzero_si512());
  }
}

// Columns [0, cols) of w, at most 16, for products [0, count), at most 32, as a group of a strip. Turned: w^T is given, its
// rows are columns.
template <bool Turned>
static inline void split_columns(const float* w, int64_t ldw, int64_t cols, int64_t count, bf16_t* to) {
  if constexpr (Turned) {
    alignas(64) float rest[16 * 32];
    if (cols < 16 || count < 32) {  // with zeros around it
      memset(rest, 0, sizeof(rest));
      for (int64_t i = 0; i < cols; ++i) memcpy(rest + i * 32, w + i * ldw, count * sizeof(float));
      w = rest;
      ldw = 32;
    }
    for (int64_t j = 0; j < 16; j += 4) {
      __m512i one[4], two[4];
      turn_16x4<true>(reinterpret_cast<const uint32_t*>(w + j), ldw, 16, one);
      turn_16x4<true>(reinterpret_cast<const uint32_t*>(w + j + 16), ldw, 16, two);
      MOA_UNROLL
      for (int i = 0; i < 4; ++i)
        store_pairs(_mm512_castsi512_ps(one[i]), _mm512_castsi512_ps(two[i]), to + (j + i) * 32);
    }
  } else {
    const __mmask16 mask = first_lanes(cols);
    auto row = [&](int64_t j) { return j < count ? _mm512_maskz_loadu_ps(mask, w + j * ldw) : _mm512_setzero_ps(); };
    for (int64_t j = 0; j < 16; ++j) store_pairs(row(j), row(j + 16), to + j * 32);
  }
}

// Columns [0, cols) of w for products [0, count), as strips, in the order in which w lies in memory.
template <bool Turned>
static void split_block(const float* w, int64_t ldw, int64_t cols, int64_t count, bf16_t* to) {
  const int64_t steps = plan::ceil_div(count, 32), groups = plan::ceil_div(cols, 32) * 2;
  for (int64_t i = 0; i < steps * groups; ++i) {
    const int64_t g = Turned ? i / steps : i % groups, step = Turned ? i % steps : i / groups, c = g * 16,
                  k = step * 32;
    bf16_t* group = to + (g / 2 * steps + step) * kTermStep + g % 2 * kTermGroup;
    const float* from = Turned ? w + c * ldw + k : w + k * ldw + c;
    if (c < cols) {
      split_columns<Turned>(from, ldw, min64(16, cols - c), min64(32, count - k), group);
    } else {
      memset(group, 0, kTermGroup * sizeof(bf16_t));
    }
  }
}

// What is done between the products: the sums of the block before are added to y, and lines of y and of the next panel
// are asked for.
struct Beside {
  const float* sums = nullptr;  // [rows][32]
  float* y = nullptr;
  int64_t ld = 0, rows = 0, cols = 0;
  const float* next_y = nullptr;
  int64_t next_rows = 0;
  const char* panel = nullptr;
  int64_t lines = 0;

  void add(int64_t begin, int64_t end) const {
    const __mmask16 low = first_lanes(cols), high = cols > 16 ? first_lanes(cols - 16) : 0;
    for (int64_t i = begin; i < min64(end, rows); ++i) {
      float *to = y + i * ld, *then = to + 16;
      const float* from = sums + i * 32;
      _mm512_mask_storeu_ps(to, low, _mm512_add_ps(_mm512_maskz_loadu_ps(low, to), _mm512_load_ps(from)));
      if (high != 0)
        _mm512_mask_storeu_ps(then, high, _mm512_add_ps(_mm512_maskz_loadu_ps(high, then), _mm512_load_ps(from + 16)));
    }
  }
  void fetch_y(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < min64(end, next_rows); ++i) {
      __builtin_prefetch(next_y + i * ld, 1, 2);
      __builtin_prefetch(next_y + i * ld + 16, 1, 2);
    }
  }
  void fetch_panel(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < min64(end, lines); ++i) __builtin_prefetch(panel + i * 64, 0, 2);
  }
};

// sums[32][32] = one panel's rows by one strip's columns. Two: false for 16 rows or fewer.
template <bool Two>
static inline void four_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (Two) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
template <bool Two>
static inline void terms_block(const bf16_t* x, const bf16_t* w, int64_t steps, float* sums, const Beside& beside) {
  const bf16_t *x1 = x + kTermGroup, *w1 = w + kTermGroup;
  const int64_t rows = plan::ceil_div(32, steps), lines = plan::ceil_div(beside.lines, steps);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, x += kTermStep, x1 += kTermStep, w += kTermStep, w1 += kTermStep) {
    _tile_loadd(4, x + 2 * kTermTile, 64);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w1, 64);
    if constexpr (Two) _tile_loadd(5, x1 + 2 * kTermTile, 64);
    four_products<Two>();
    beside.add(s * rows, (s + 1) * rows);
    _tile_loadd(4, x, 64);
    if constexpr (Two) _tile_loadd(5, x1, 64);
    four_products<Two>();
    beside.fetch_panel(s * lines, (s + 1) * lines);
    _tile_loadd(6, w + 2 * kTermTile, 64);
    _tile_loadd(7, w1 + 2 * kTermTile, 64);
    four_products<Two>();
    beside.fetch_y(s * rows, (s + 1) * rows);
    _tile_loadd(6, w + kTermTile, 64);
    _tile_loadd(7, w1 + kTermTile, 64);
    four_products<Two>();
    _tile_loadd(4, x + kTermTile, 64);
    if constexpr (Two) _tile_loadd(5, x1 + kTermTile, 64);
    four_products<Two>();
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w1, 64);
    four_products<Two>();
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if constexpr (Two) {
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
  }
}

// y[t][:] += sum_k x[t][k] w[k][:], y `width` wide; Turned: w is [width][depth]. again(t0, t1) for the rows [t0, t1) of x
// that are not finite, which are left out.
template <bool Turned, class Again>
static void terms_product(const float* x, int64_t ldx, int64_t tokens, int64_t depth, const float* w, int64_t ldw,
                          float* y, int64_t width, const Again& again) {
  const int64_t steps = plan::ceil_div(depth, 32), panel = steps * kTermStep;
  const bool wide = plan::worth_threads(tokens * depth * 4);
  const int64_t most = plan::terms_tokens(depth);
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t now = min64(most, tokens - first), groups = plan::ceil_div(now, 16);
    bf16_t* split = scratch<bf16_t>(Scratch::call_first, round_up(groups, 2) / 2 * panel);
    bool* finite = scratch<bool>(Scratch::call_groups, now);
    parallel_tasks(groups, wide, [&](int64_t g) {
      split_rows(x + (first + g * 16) * ldx, ldx, min64(16, now - g * 16), depth,
                 split + g / 2 * panel + g % 2 * kTermGroup, finite + g * 16);
    });
    const plan::Terms plan = plan::terms(now, width, thread_count());
    const int64_t blocks = plan::ceil_div(now, plan.tokens), col_blocks = plan::ceil_div(width, plan.cols);
    parallel_tasks(blocks * col_blocks, wide, [&](int64_t task) {
      const int64_t t0 = task / col_blocks * plan.tokens, t1 = min64(t0 + plan.tokens, now);
      const int64_t c0 = task % col_blocks * plan.cols, cols = min64(plan.cols, width - c0);
      const int64_t strips = plan::ceil_div(cols, 32);
      bf16_t* packed = scratch<bf16_t>(Scratch::panel, strips * plan::kTermsRun * kTermStep / 32);
      alignas(64) float sums[2][32 * 32];
      TileShapes shapes;
      for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16, 64);
      shapes.load();
      Beside beside;
      beside.ld = width;
      int turn = 0;
      for (int64_t k0 = 0; k0 < depth; k0 += plan::kTermsRun) {
        const int64_t count = min64(plan::kTermsRun, depth - k0), here = plan::ceil_div(count, 32);
        split_block<Turned>(Turned ? w + c0 * ldw + k0 : w + k0 * ldw + c0, ldw, cols, count, packed);
        beside.lines = here * kTermStep / 32 / strips;
        for (int64_t t = t0; t < t1; t += 32) {
          const bf16_t* rows = split + t / 32 * panel + k0 / 32 * kTermStep;
          if (t + 32 >= t1) beside.lines = 0;
          for (int64_t s = 0; s < strips; ++s) {
            const bf16_t* strip = packed + s * here * kTermStep;
            float* out = y + (first + t) * width + c0 + s * 32;
            beside.panel = reinterpret_cast<const char*>(rows + panel) + s * beside.lines * 64;
            beside.next_y = out;
            beside.next_rows = min64(32, t1 - t);
            if (t1 - t > 16) {
              terms_block<true>(rows, strip, here, sums[turn], beside);
            } else {
              terms_block<false>(rows, strip, here, sums[turn], beside);
            }
            beside.sums = sums[turn];
            beside.y = out;
            beside.rows = beside.next_rows;
            beside.cols = min64(32, cols - s * 32);
            turn ^= 1;
          }
        }
      }
      beside.add(0, 32);
    });
    for (int64_t t = 0; t < now; ++t) {
      if (finite[t]) continue;
      int64_t end = t;
      while (end < now && !finite[end]) ++end;
      again(first + t, first + end);
      t = end - 1;
    }
  }
}

}  // namespace MOA_ISA
}  // namespace moa
