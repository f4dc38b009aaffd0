// Router logits z = x W^T on a CPU, [tokens, experts] in the accumulator type. Included only by csrc/isa/kernels.cpp.
#pragma once
#include "common/parallel.h"
#include "common/scratch.h"
#include "lora/kernels.h"
#include "routing/routing.h"

namespace moa {
namespace MOA_ISA {

#if defined(MOA_HAS_AMX_BF16)
// The same on tiles for a bfloat16 x, in float32 accuracy: W as a sum of three bfloat16 terms, the products exact.
// Groups of sixteen experts, first all with the first term, then with the second and the third.
static void router_logits_tiles(const RouterParams& p) {
  constexpr int64_t kTerms = 3;
  const bf16_t* x = static_cast<const bf16_t*>(p.x);
  const float* weight = static_cast<const float*>(p.weight);
  float* logits = static_cast<float*>(p.logits);
  const int64_t blocks = plan::ceil_div(p.experts, 16), k_end = round_up(p.in, kTileDepth), ld = kTerms * blocks * 16;
  uint32_t* packed = scratch<uint32_t>(Scratch::call_packed, ld * k_end / 2);
  const bool wide = plan::worth_threads(p.tokens * p.in * 2);
  parallel_tasks(blocks, wide, [&](int64_t block) {
    const int64_t e0 = block * 16, n = min64(16, p.experts - e0);
    bf16_t* terms = scratch<bf16_t>(Scratch::panel, kTerms * n * p.in);
    for (int64_t i = 0; i < n * p.in; i += 16) {
      const __mmask16 mask = first_lanes(n * p.in - i);
      __m512 rest = _mm512_maskz_loadu_ps(mask, weight + e0 * p.in + i);
      for (int64_t term = 0; term < kTerms; ++term) {
        const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
        _mm256_mask_storeu_epi16(terms + term * n * p.in + i, mask, bits);
        const __m512 left = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
        // Of an infinity or a NaN nothing: the first term says so.
        rest = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(left, left, _CMP_ORD_Q), left);
      }
    }
    for (int64_t term = 0; term < kTerms; ++term)
      pack_pairs(terms + term * n * p.in, p.in, n, p.in, packed + (term * blocks + block) * k_end * 8);
  });
  parallel_tasks(plan::ceil_div(p.tokens, 32), wide, [&](int64_t task) {
    const int64_t t0 = task * 32, m = min64(32, p.tokens - t0);
    float* sums = scratch<float>(Scratch::tile, 32 * ld);
    dense_dot(x + t0 * p.ldx, p.ldx, m, packed, p.in, kTerms * blocks, sums, ld);
    for (int64_t t = 0; t < m; ++t)
      for (int64_t e = 0; e < p.experts; ++e) {
        const float* sum = sums + t * ld + e;
        logits[(t0 + t) * p.experts + e] = sum[2 * blocks * 16] + sum[blocks * 16] + sum[0];
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
  const int64_t ld = round_up(p.experts, V::kIn), run = plan::kPanelRun;
  In* turned = scratch<In>(Scratch::call_packed, p.in * ld);
  parallel_tasks(plan::ceil_div(p.in, run), true, [&](int64_t task) {
    const int64_t k0 = task * run;
    transpose(weight + k0, p.in, p.experts, min64(run, p.in - k0), turned + k0 * ld, ld);
  });
  parallel_tasks(plan::ceil_div(p.tokens, plan::kPanelTokens), true, [&](int64_t task) {
    const int64_t t0 = task * plan::kPanelTokens, m = min64(plan::kPanelTokens, p.tokens - t0);
    const In* rows[plan::kPanelTokens];
    In* buffer = direct ? nullptr : scratch<In>(Scratch::rows, m * p.in);
    for (int64_t i = 0; i < m; ++i)
      rows[i] = row_as<V, T>(x + (t0 + i) * p.ldx, p.in, direct ? nullptr : buffer + i * p.in);
    panel_block<V>(rows, m, turned, ld, p.experts, p.in, logits + t0 * p.experts, p.experts);
  });
}

template <class V, class T>
static void router_logits(const RouterParams& p) {
#if defined(MOA_HAS_AMX_BF16)
  if constexpr (Same<T, bf16_t>::value)
    if (plan::router_tiles(p.tokens, p.experts)) return router_logits_tiles(p);
#endif
  if constexpr (V::kPanels)
    if (plan::router_panel(p.tokens, p.experts, processor())) return router_logits_panel<V, T>(p);
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
          return p.experts;
        },
        [&](int64_t, int64_t, int64_t) { return Ahead(weight, 0); });
  In* dw = static_cast<In*>(p.d_weight);
  if (dw != nullptr)
    gram<V, T>(
        all, dz, p.experts, static_cast<const T*>(p.x), p.ldx, p.in, [&](int64_t) { return p.experts; },
        [&](int64_t, int64_t e, int64_t col) { return dw + e * p.in + col; }, [](int64_t, int64_t, int64_t, In*) {},
        [&](int64_t) { memset(dw, 0, p.experts * p.in * sizeof(In)); },
        [](int64_t, int64_t, int64_t) { return false; });
}

}  // namespace MOA_ISA
}  // namespace moa
