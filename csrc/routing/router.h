// Router logits z = x W^T on a CPU, [tokens, experts] in the accumulator type. Included only by csrc/isa/kernels.cpp.
#pragma once
#include "common/parallel.h"
#include "common/scratch.h"
#include "lora/kernels.h"
#include "routing/routing.h"

namespace moa {
namespace MOA_ISA {

#if defined(MOA_HAS_AMX_BF16)
// sums[64][16] = <x_t, w_e> for `tiles` <= 4 tiles of sixteen tokens and sixteen experts, over k_size columns. x: rows of
// kTilePitch, whole tiles; W: three terms of pairs, `term` apart, all added to one sum, the smallest first.
static void three_term_dot(const bf16_t* x, int tiles, const uint32_t* w, int64_t term, int64_t k_size, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < k_size; k += 32, x += 32, w += 256) {
    _tile_loadd(5, w, 64);
    _tile_loadd(6, w + term, 64);
    _tile_loadd(7, w + 2 * term, 64);
    _tile_loadd(4, x, kTilePitch * 2);
    _tile_dpbf16ps(0, 4, 7);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(0, 4, 5);
    if (tiles < 2) continue;
    _tile_loadd(4, x + 16 * kTilePitch, kTilePitch * 2);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(1, 4, 5);
    if (tiles < 3) continue;
    _tile_loadd(4, x + 32 * kTilePitch, kTilePitch * 2);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(2, 4, 5);
    if (tiles < 4) continue;
    _tile_loadd(4, x + 48 * kTilePitch, kTilePitch * 2);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(3, 4, 6);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// The same on tiles for a bfloat16 x, in float32 accuracy: W as a sum of three bfloat16 terms, the products exact, in
// runs of kTileChunk columns.
static void router_logits_tiles(const RouterParams& p) {
  constexpr int64_t kTerms = 3, kRows = 64, kRun = kTileChunk;
  const bf16_t* x = static_cast<const bf16_t*>(p.x);
  const float* weight = static_cast<const float*>(p.weight);
  float* logits = static_cast<float*>(p.logits);
  const int64_t blocks = plan::ceil_div(p.experts, 16), k_end = round_up(p.in, kTileDepth), term = blocks * k_end * 8;
  uint32_t* packed = scratch<uint32_t>(Scratch::call_packed, kTerms * term);
  const bool wide = plan::worth_threads(p.tokens * p.in * 2);
  parallel_tasks(blocks, wide, [&](int64_t block) {
    const int64_t e0 = block * 16, n = min64(16, p.experts - e0);
    bf16_t* terms = scratch<bf16_t>(Scratch::panel, kTerms * n * p.in);
    for (int64_t i = 0; i < n * p.in; i += 16) {
      const __mmask16 mask = first_lanes(n * p.in - i);
      __m512 rest = _mm512_maskz_loadu_ps(mask, weight + e0 * p.in + i);
      for (int64_t j = 0; j < kTerms; ++j) {
        const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
        _mm256_mask_storeu_epi16(terms + j * n * p.in + i, mask, bits);
        const __m512 left =
            _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
        // Of an infinity or a NaN nothing: the first term says so.
        rest = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(left, left, _CMP_ORD_Q), left);
      }
    }
    for (int64_t j = 0; j < kTerms; ++j)
      pack_pairs(terms + j * n * p.in, p.in, n, p.in, packed + j * term + block * k_end * 8);
  });
  // Some blocks of rows a task, so that a run of W is read from L2 for all but the first.
  const int64_t own = plan::router_tile_rows(p.tokens);
  parallel_tasks(plan::ceil_div(p.tokens, own), wide, [&](int64_t task) {
    bf16_t* rows = scratch<bf16_t>(Scratch::rows, kRows * kTilePitch);
    alignas(64) float sums[kRows * 16];
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16, 64);
    shapes.load();
    const int64_t begin = task * own, end = min64(begin + own, p.tokens);
    for (int64_t k0 = 0; k0 < p.in; k0 += kRun)
      for (int64_t t0 = begin; t0 < end; t0 += kRows) {
        const int64_t k_size = min64(kRun, round_up(p.in - k0, 32)), m = min64(kRows, end - t0);
        const int tiles = static_cast<int>(plan::ceil_div(m, 16));
        for (int64_t t = 0; t < m; ++t) copy_columns(x + (t0 + t) * p.ldx, k0, k_size, p.in, rows + t * kTilePitch);
        memset(rows + m * kTilePitch, 0, (tiles * 16 - m) * kTilePitch * sizeof(bf16_t));
        for (int64_t block = 0; block < blocks; ++block) {
          three_term_dot(rows, tiles, packed + (block * k_end + k0) * 8, term, k_size, sums);
          const __mmask16 mask = first_lanes(p.experts - block * 16);
          for (int64_t t = 0; t < m; ++t) {
            float* to = logits + (t0 + t) * p.experts + block * 16;
            __m512 sum = _mm512_load_ps(sums + t * 16);
            if (k0 > 0) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum);
            _mm512_mask_storeu_ps(to, mask, sum);
          }
        }
      }
  });
}
#endif

// The same by panels of W turned over.
template <class V, class T>
static void router_logits_panel(const RouterParams& p) {
  using In = typename V::In;
  constexpr bool direct = Same<T, In>::value;
  const In* weight = static_cast<const In*>(p.weight);
  const T* x = static_cast<const T*>(p.x);
  In* logits = static_cast<In*>(p.logits);
  // Of AVX2, whose tiles are narrow, in strips; else in one.
  const int64_t ld = round_up(p.experts, V::kStrips ? kStrip<V> : V::kIn), strip = V::kStrips ? kStrip<V> : ld;
  const int64_t run = plan::kPanelRun;
  In* turned = scratch<In>(Scratch::call_packed, p.in * ld);
  const bool wide = plan::worth_threads((p.tokens + p.experts) * p.in * static_cast<int64_t>(sizeof(In)));
  parallel_tasks(plan::ceil_div(p.in, run), wide, [&](int64_t task) {
    const int64_t k0 = task * run, count = min64(run, p.in - k0);
    for (int64_t e = 0; e < p.experts; e += strip)
      transpose(weight + e * p.in + k0, p.in, min64(strip, p.experts - e), count, turned + k0 * ld + e * count, strip);
  });
  const int64_t chunk = plan::panel_tokens(p.tokens, kWide<V>);
  parallel_tasks(plan::ceil_div(p.tokens, chunk), wide, [&](int64_t task) {
    const int64_t t0 = task * chunk, m = min64(chunk, p.tokens - t0);
    const In* rows[plan::kPanelTokens];
    In* buffer = direct ? nullptr : scratch<In>(Scratch::rows, m * p.in);
    for (int64_t i = 0; i < m; ++i)
      rows[i] = row_as<V, T>(x + (t0 + i) * p.ldx, p.in, direct ? nullptr : buffer + i * p.in);
    panel_block<V>(
        rows, m, p.experts, p.in, logits + t0 * p.experts, p.experts,
        [&](int64_t k0, int64_t count) -> PanelRun<In> { return {turned + k0 * ld, strip, strip == ld ? 1 : count}; });
  });
}

// The same by dot products.
template <class V, class T>
static void router_logits_dots(const RouterParams& p) {
  using In = typename V::In;
  constexpr bool direct = Same<T, In>::value;
  const In* weight = static_cast<const In*>(p.weight);
  const T* x = static_cast<const T*>(p.x);
  In* logits = static_cast<In*>(p.logits);
  const plan::Router plan = plan::router(p.tokens, p.experts);
  const int64_t splits = plan::ceil_div(p.experts, plan.expert_split);
  const int64_t blocks = plan::ceil_div(p.tokens, plan.tokens);
  const bool wide = plan::worth_threads((p.tokens + p.experts) * p.in * static_cast<int64_t>(sizeof(In)));
  parallel_tasks(blocks * splits, wide, [&](int64_t task) {
    const int64_t t0 = task / splits * plan.tokens, e0 = task % splits * plan.expert_split;
    const int64_t m = p.tokens - t0 < plan.tokens ? p.tokens - t0 : plan.tokens;
    const int64_t n = p.experts - e0 < plan.expert_split ? p.experts - e0 : plan.expert_split;
    const Ahead rest(weight + e0 * p.in, plan.x_outer && t0 == 0 ? n * p.in * static_cast<int64_t>(sizeof(In)) : 0);
    // Rows that must be converted go tile by tile where x stays in L1.
    const int64_t step = direct || !plan.x_outer ? m : V::kDotM;
    const int64_t left = p.tokens - t0;
    const int64_t known = direct ? (m + V::kDotM < left ? m + V::kDotM : left) : step;
    const In** rows = scratch<const In*>(Scratch::pointers, known);
    In* buffer = direct ? nullptr : scratch<In>(Scratch::rows, step * p.in);
    for (int64_t i0 = 0; i0 < m; i0 += step) {
      const int64_t here = m - i0 < step ? m - i0 : step, readable = direct ? known : here;
      for (int64_t i = 0; i < readable; ++i)
        rows[i] = row_as<V, T>(x + (t0 + i0 + i) * p.ldx, p.in, direct ? nullptr : buffer + i * p.in);
      dot_block<V>(rows, here, readable - here, weight + e0 * p.in, p.in, n, p.in, logits + (t0 + i0) * p.experts + e0,
                   p.experts, plan.x_outer, rest);
    }
  });
}

#if defined(MOA_HAS_AMX_BF16)
// The same for a float32 x and many experts, by terms as the base's product (terms.h).
static void router_logits_terms(const RouterParams& p) {
  const float *x = static_cast<const float*>(p.x), *weight = static_cast<const float*>(p.weight);
  float* logits = static_cast<float*>(p.logits);
  memset(logits, 0, p.tokens * p.experts * sizeof(float));
  terms_product<true>(x, p.ldx, p.tokens, p.in, weight, p.in, logits, p.experts, [&](int64_t t0, int64_t t1) {
    RouterParams rows = p;
    rows.tokens = t1 - t0;
    rows.x = x + t0 * p.ldx;
    rows.logits = logits + t0 * p.experts;
    router_logits_dots<F32, float>(rows);
  });
}
#endif

template <class V, class T>
static void router_logits(const RouterParams& p) {
#if defined(MOA_HAS_AMX_BF16)
  if constexpr (Same<T, bf16_t>::value)
    if (plan::router_tiles(p.tokens, p.experts)) return router_logits_tiles(p);
  if constexpr (Same<T, float>::value)
    if (plan::router_terms(p.tokens, p.experts, p.in)) return router_logits_terms(p);
#endif
  if constexpr (V::kPanels)
    if (V::kStrips ? plan::strips_pay(p.tokens, p.experts) : plan::panel_pays(p.tokens, p.experts, processor()))
      return router_logits_panel<V, T>(p);
  router_logits_dots<V, T>(p);
}

// To the kernels this is a LoRA of one expert that has every token and as many ranks as there are experts.
template <class V, class T>
static void router_backward(const RouterBackwardParams& p) {
  using In = typename V::In;
  const int32_t offsets[2] = {0, static_cast<int32_t>(p.tokens)};
  const Segments all{offsets, p.rows, p.tokens, 1, 1};
  const In* weight = static_cast<const In*>(p.weight);
  const In* dz = static_cast<const In*>(p.dz);
  T* dx = static_cast<T*>(p.dx);
  if (dx != nullptr)
    expand<V, T>(
        all, dz, p.experts, p.in, dx, dx, p.in, nullptr, [&](int64_t) { return p.experts; },
        [&](int64_t, int64_t col, int64_t, const In** rows) {
          for (int64_t e = 0; e < p.experts; ++e) rows[e] = weight + e * p.in + col;
          return PanelRows{p.experts, kStrip<V>};
        },
        [&](int64_t, int64_t, int64_t) { return Ahead(weight, 0); });
  In* dw = static_cast<In*>(p.d_weight);
  if (dw != nullptr)
    gram<V, T>(
        all, dz, p.experts, static_cast<const T*>(p.x), p.ldx, p.in, [&](int64_t) { return p.experts; },
        [&](int64_t, int64_t e, int64_t col) { return dw + e * p.in + col; }, [](int64_t, int64_t, int64_t, In*) {},
        [&](int64_t, int64_t, int64_t) { return Ahead(dw, 0); },
        [&](int64_t) { memset(dw, 0, p.experts * p.in * sizeof(In)); },
        [](int64_t, int64_t, int64_t) { return false; });
}

}  // namespace MOA_ISA
}  // namespace moa
