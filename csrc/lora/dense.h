// Shrink and expand as dense products on AMX, for few adapters and many tokens: every token against every expert, what
// it has not chosen left out or multiplied by zero. That is experts / top_k times the arithmetic, which the tiles have
// to spare, and no row is gathered: tokens stay side by side. When it pays: plan::dense_shrink, plan::dense_expand.
// Included only by kernels.h.
#pragma once

namespace moa {
namespace MOA_ISA {

// ---- shrink ----------------------------------------------------------------------------------------------------------
// Sixteen ranks of one expert are a group. packed: [groups][k_end / 2][16] pairs, as pack_pairs writes them.
struct Group {
  int64_t expert, rank0, ranks;
};

// sums[t][16 g + j] = <x_t, row j of group g> for `tokens` <= 32 rows of x and every group, two at a time: two tiles of
// tokens against two of ranks, each product waiting only for the fourth before it.
static void dense_dot(const bf16_t* x, int64_t ldx, int64_t tokens, const uint32_t* packed, int64_t k_size,
                      int64_t groups, float* sums, int64_t ld) {
  const int64_t k_whole = k_size / 32 * 32, k_end = round_up(k_size, kTileDepth);
  const int high = static_cast<int>(min64(tokens, 16)), low = static_cast<int>(tokens - high);
  TileShapes shapes;
  shapes.set(0, high, 64);
  shapes.set(1, high, 64);
  shapes.set(4, high, 64);
  if (low > 0) {
    shapes.set(2, low, 64);
    shapes.set(3, low, 64);
    shapes.set(5, low, 64);
  }
  shapes.set(6, 16, 64);
  shapes.set(7, 16, 64);
  shapes.load();
  // The last columns, where they are no whole tile, with zeros behind them.
  alignas(64) bf16_t rest[32 * 32];
  if (k_whole < k_size)
    for (int64_t t = 0; t < tokens; ++t) copy_columns(x + t * ldx, k_whole, 32, k_size, rest + t * 32);
  for (int64_t g = 0; g < groups; g += 2) {
    const uint32_t* a = packed + g * k_end * 8;
    const uint32_t* b = g + 1 < groups ? a + k_end * 8 : a;
    _tile_zero(0);
    _tile_zero(1);
    if (low > 0) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < k_size; k += 32) {
      const bool whole = k < k_whole;
      const bf16_t* row = whole ? x + k : rest;
      const int64_t pitch = whole ? ldx * 2 : 64;
      _tile_loadd(4, row, pitch);
      _tile_loadd(6, a + k * 8, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + k * 8, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (low > 0) {
        _tile_loadd(5, row + 16 * (pitch / 2), pitch);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums + g * 16, ld * 4);
    if (g + 1 < groups) _tile_stored(1, sums + g * 16 + 16, ld * 4);
    if (low == 0) continue;
    _tile_stored(2, sums + 16 * ld + g * 16, ld * 4);
    if (g + 1 < groups) _tile_stored(3, sums + 16 * ld + g * 16 + 16, ld * 4);
  }
}

// What shrink (slots.h) does.
template <class Depth, class PanelRows>
static void dense_shrink(const Segments& s, const bf16_t* x, int64_t ldx, int64_t k_size, float* out, int64_t rank,
                         int64_t ld_panel, const Depth& depth, const PanelRows& panel) {
  const TokenAt token_at(s);
  const int64_t k_end = round_up(k_size, kTileDepth), per_expert = plan::ceil_div(rank, 16);
  int64_t groups = 0;
  Group* group = scratch<Group>(Scratch::call_groups, s.experts * per_expert);
  for (int64_t e = 0; e < s.experts; ++e)
    for (int64_t j = 0; j < depth(e); j += 16) group[groups++] = {e, j, min64(16, depth(e) - j)};
  uint32_t* packed = scratch<uint32_t>(Scratch::call_packed, groups * k_end * 8);
  const bool wide = plan::worth_threads(s.tokens * k_size * 2);
  parallel_tasks(groups, wide, [&](int64_t g) {
    const Group& here = group[g];
    pack_pairs(panel(here.expert, here.rank0, here.rank0 + here.ranks), ld_panel, here.ranks, k_size,
               packed + g * k_end * 8);
  });
  parallel_tasks(plan::ceil_div(s.tokens, 32), wide, [&](int64_t task) {
    const int64_t t0 = task * 32, t1 = min64(t0 + 32, s.tokens), ld = groups * 16;
    float* sums = scratch<float>(Scratch::tile, 32 * ld);
    dense_dot(x + t0 * ldx, ldx, t1 - t0, packed, k_size, groups, sums, ld);
    for (int64_t g = 0; g < groups; ++g) {
      const Group& here = group[g];
      const int64_t end = s.offsets[here.expert + 1];
      for (int64_t q = first_slot(s.order, s.offsets[here.expert], end, t0 * s.top_k); q < end; ++q) {
        const int64_t t = token_at(q);
        if (t >= t1) break;
        memcpy(out + q * rank + here.rank0, sums + (t - t0) * ld + g * 16, here.ranks * sizeof(float));
      }
    }
  });
  for (int64_t e = 0; e < s.experts; ++e)
    for (int64_t q = s.offsets[e]; depth(e) < rank && q < s.offsets[e + 1]; ++q)
      memset(out + q * rank + depth(e), 0, (rank - depth(e)) * sizeof(float));
}

// ---- expand ----------------------------------------------------------------------------------------------------------
// Whether a pair of bfloat16 has an infinity or a NaN, for sixteen pairs.
static inline bool any_not_finite(__m512i pairs) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent) != 0;
}

// sums[32][64], 32 columns of them = 32 tokens' coefficients, rows `pitch` bytes apart, times a pair of column tiles a
// step: two tiles against two, so that four products need four tiles.
static inline void dense_pair(const bf16_t* coef, int64_t pitch, const uint32_t* b, int64_t steps, float* sums) {
  const bf16_t* lower = coef + 8 * pitch;  // sixteen rows on
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; ++k, coef += 32, lower += 32, b += 512) {
    _tile_loadd(4, coef, pitch);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 256, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, pitch);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 256);
  _tile_stored(1, sums + 16, 256);
  _tile_stored(2, sums + 16 * 64, 256);
  _tile_stored(3, sums + 16 * 64 + 16, 256);
}

// One task of expand (kernels.h): tokens [t0, t1), columns [c0, c0 + cols). coef: [tokens][2 packs] of every token and
// every expert, zero where it is not chosen; packs: pairs of ranks, of all experts. False, and nothing written, where
// cols are no whole tiles, or where an expert has weights that are not finite: zero times those would reach the tokens
// of others.
template <class Depth, class Panel>
static bool dense_expand(const Segments& s, const bf16_t* coef, int64_t packs, int64_t ldc, int64_t width, bf16_t* y,
                         const bf16_t* base, int64_t ldbase, const bf16_t* bias, int64_t t0, int64_t t1, int64_t c0,
                         int64_t cols, const Depth& depth, const Panel& panel) {
  if (cols % 64 != 0) return false;
  const int64_t steps = plan::ceil_div(packs, 16);
  // [pair of tiles, 32 columns][step of 16 pairs of ranks][2 tiles][16 pairs][16 columns]
  uint32_t* b = scratch<uint32_t>(Scratch::tiles, cols / 32 * steps * 512);
  int64_t at = 0;
  bool finite = true;
  auto put = [&](const bf16_t* row) {
    for (int64_t c = 0; c < cols; c += 16) {
      const __m512i pairs = row != nullptr ? _mm512_loadu_si512(row + 2 * c) : _mm512_setzero_si512();
      finite = finite && !any_not_finite(pairs);
      _mm512_storeu_si512(b + (c / 32 * steps + at / 16) * 512 + c / 16 % 2 * 256 + at % 16 * 16, pairs);
    }
    ++at;
  };
  const bf16_t** rows = scratch<const bf16_t*>(Scratch::pointers, ldc);
  for (int64_t e = 0; e < s.experts && finite; ++e) {
    if (depth(e) == 0) continue;
    const int64_t k_size = panel(e, c0, cols, rows).count;
    for (int64_t k = 0; k < k_size; ++k) put(rows[k]);
  }
  if (!finite) return false;
  while (at < steps * 16) put(nullptr);

  float* start = scratch<float>(Scratch::tile, cols);
  if (bias != nullptr) {
    convert_row(bias + c0, start, cols);
  } else {
    memset(start, 0, cols * sizeof(float));
  }
  alignas(64) float sums[32 * 64];
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16, 64);
  shapes.load();
  for (int64_t c = 0; c < cols; c += 64)
    for (int64_t t = t0; t < t1; t += 32) {  // coef has rows to spare behind the last token's
      const uint32_t* p = b + c / 32 * steps * 512;
      dense_pair(coef + t * 32 * steps, 64 * steps, p, steps, sums);
      dense_pair(coef + t * 32 * steps, 64 * steps, p + steps * 512, steps, sums + 32);
      for (int64_t i = 0; i < min64(32, t1 - t); ++i) {
        const bf16_t* from = base != nullptr ? base + (t + i) * ldbase + c0 + c : nullptr;
        bf16_t* to = y + (t + i) * width + c0 + c;
        if (from != nullptr && t + 32 + i < t1) {  // the next tiles' two lines
          __builtin_prefetch(from + 32 * ldbase, 1, 3);
          __builtin_prefetch(from + 32 * ldbase + 32, 1, 3);
        }
        for (int64_t n = 0; n < 64; n += 16) {
          __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + i * 64 + n), _mm512_loadu_ps(start + c + n));
          if (from != nullptr) sum = _mm512_add_ps(sum, widened(from + n));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + n), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
        }
      }
    }
  return true;
}

// The coefficients that dense_expand wants: [tokens, and 31 rows more][32 steps]. A token twice under one expert has
// the sum of both.
template <class Depth>
static const bf16_t* dense_coefficients(const Segments& s, const bf16_t* coef, int64_t ldc, int64_t steps,
                                        const Depth& depth) {
  const TokenAt token_at(s);
  const int64_t ld = 32 * steps;
  bf16_t* all = scratch<bf16_t>(Scratch::call_dense, (s.tokens + 31) * ld);
  memset(all, 0, (s.tokens + 31) * ld * sizeof(bf16_t));
  int64_t at = 0;
  for (int64_t e = 0; e < s.experts; ++e) {
    const int64_t here = round_up(depth(e), 2);
    int64_t last = -1;
    for (int64_t q = s.offsets[e]; here > 0 && q < s.offsets[e + 1]; ++q) {
      const int64_t t = token_at(q);
      bf16_t* to = all + t * ld + at;
      const bf16_t* from = coef + q * ldc;
      if (t != last) {
        memcpy(to, from, here * sizeof(bf16_t));
      } else {
        for (int64_t j = 0; j < here; ++j) from_acc(to_acc(to[j]) + to_acc(from[j]), to + j);
      }
      last = t;
    }
    at += here;
  }
  return all;
}

}  // namespace MOA_ISA
}  // namespace moa
