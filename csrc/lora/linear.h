// The base's product on a CPU, y += x W^T, and its gradient, dx += dy W, where the library's GEMM is slower
// (plan::linear). Included only by csrc/isa/kernels.cpp.
//
// A GEMM packs its operands before it multiplies: that pays for hundreds of tokens. With a few, reading W is the whole
// work, so every row of W is read once, as it lies, against all tokens. With many, blocks of W are packed here too, on AMX
// as terms of bfloat16. A task owns columns of the result.
#pragma once
#include "lora/kernels.h"

#if defined(MOA_HAS_AMX_BF16)
#include "lora/terms.h"
#endif

namespace moa {
namespace MOA_ISA {

// Tokens [t0, t0 + tokens) of x as rows of In, converted if need be, in memory of the calling thread that its workers
// share.
template <class V, class T>
static const typename V::In** rows_of(const void* x, int64_t ldx, int64_t t0, int64_t tokens, int64_t width) {
  using In = typename V::In;
  const T* row = static_cast<const T*>(x) + t0 * ldx;
  const In** rows = scratch<const In*>(Scratch::call_pointers, tokens);
  In* buffer = Same<T, In>::value ? nullptr : scratch<In>(Scratch::call_first, tokens * width);
  for (int64_t t = 0; t < tokens; ++t)
    rows[t] = row_as<V, T>(row + t * ldx, width, buffer == nullptr ? nullptr : buffer + t * width);
  return rows;
}

// ---- y += x W^T for tokens [t0, t0 + tokens): dot tiles, a group of W's rows against all tokens ----------------
template <class V, class T>
static void linear_tokens(const LinearParams& p, int64_t t0, int64_t tokens) {
  using In = typename V::In;
  using Acc = typename V::Acc;
  const T* weight = static_cast<const T*>(p.weight);
  T* y = static_cast<T*>(p.y);
  const In** rows = rows_of<V, T>(p.x, p.ldx, t0, tokens, p.in);

  const int64_t block = plan::linear_rows(p.out), fetched = plan::linear_fetch(processor()) ? V::kDotN : 0;
  parallel_tasks(plan::ceil_div(p.out, block), plan::worth_threads(p.out * p.in * sizeof(T)), [&](int64_t task) {
    const int64_t begin = task * block, end = min64(begin + block, p.out);
    Acc* tile = scratch<Acc>(Scratch::tile, tokens * block);
    for (int64_t o = begin; o < end; o += V::kDotN) {
      const int64_t n = min64(V::kDotN, end - o), soon = min64(fetched, p.out - o - n);
      const T* w = weight + o * p.ldw;
      const Ahead ahead(w + n * p.ldw, soon * p.ldw * static_cast<int64_t>(sizeof(T)));
      dot_block<V>(rows, tokens, 0, w, p.ldw, n, p.in, tile + o - begin, block, false, ahead);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      Acc* sum = tile + t * block;
      T* out = y + (t0 + t) * p.out + begin;
      add_row(out, sum, end - begin);
      convert_row(sum, out, end - begin);
    }
  });
}

// ---- dx += dy W for tokens [t0, t0 + tokens): axpy tiles over panels of W's rows --------------------------------------
template <class V, class T>
static void linear_backward_tokens(const LinearBackwardParams& p, int64_t t0, int64_t tokens) {
  using In = typename V::In;
  using Acc = typename V::Acc;
  const T* weight = static_cast<const T*>(p.weight);
  T* dx = static_cast<T*>(p.dx);
  const In** dy = rows_of<V, T>(p.dy, p.lddy, t0, tokens, p.out);
  const int64_t ld = tokens > 1 ? dy[1] - dy[0] : 0;
  constexpr int64_t kRows = plan::kLinearPanel * V::kPack;  // of W in a panel

  const int64_t block = plan::linear_cols(p.in);
  parallel_tasks(plan::ceil_div(p.in, block), plan::worth_threads(p.out * p.in * sizeof(T)), [&](int64_t task) {
    const int64_t c0 = task * block, cols = min64(block, p.in - c0);
    // Sums of one run of outputs: totals of many runs lose less to rounding than one long sum.
    Acc* run = scratch<Acc>(Scratch::tile, 2 * tokens * cols);
    Acc* total = run + tokens * cols;
    memset(total, 0, tokens * cols * sizeof(Acc));
    In* buffer = scratch<In>(Scratch::panel, kRows * cols);
    for (int64_t r0 = 0; r0 < p.out; r0 += plan::kGramRun) {
      const int64_t r1 = min64(r0 + plan::kGramRun, p.out);
      memset(run, 0, tokens * cols * sizeof(Acc));
      for (int64_t o = r0; o < r1; o += kRows) {
        const int64_t steps = plan::ceil_div(min64(kRows, r1 - o), V::kPack);
        const In* panel[plan::kLinearPanel];
        for (int64_t i = 0; i < steps; ++i) {
          const T* w = weight + (o + i * V::kPack) * p.ldw + c0;
          In* packed = buffer + i * V::kPack * cols;
          if constexpr (V::kPack == 1) {
            panel[i] = row_as<V, T>(w, cols, packed);
          } else {
            interleave(w, w + p.ldw, cols, packed);
            panel[i] = packed;
          }
        }
        const int64_t next = o + kRows, next_end = min64(next + kRows, p.out);  // fetched between the tiles of this one
        int64_t soon = next;
        Ahead none(weight, 0);
        for (int64_t t = 0; t < tokens; t += V::kAxpyM) {
          for (; soon < next_end && (soon - next) * tokens <= kRows * t; ++soon)
            prefetch_row(weight + soon * p.ldw + c0, cols);
          const int m = static_cast<int>(min64(V::kAxpyM, tokens - t));
          Acc* to[V::kAxpyM];
          for (int i = 0; i < m; ++i) to[i] = run + (t + i) * cols;
          axpy_block<V>(m, to, to, dy[t] + o, ld, V::kPack, panel, steps, cols, &none);
        }
      }
      add_row(run, total, tokens * cols);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      T* out = dx + (t0 + t) * p.in + c0;
      add_row(out, total + t * cols, cols);
      convert_row(total + t * cols, out, cols);
    }
  });
}

// ---- many tokens: blocks of W packed, x broadcast against them (panel.h) --------------------------------------------
// y[t][:] += sum_k x[t][k] w[k][:] of `depth` products, y `width` wide. pack(c0, cols, k0, count, to) packs columns
// [c0, c0 + cols) of w, at most kStrip, for products [k0, k0 + count): rows of kStrip.
template <class V, class T, class Pack>
static void packed_product(const T* x, int64_t ldx, int64_t tokens, int64_t depth, T* y, int64_t width,
                           const Pack& pack) {
  using In = typename V::In;
  using Acc = typename V::Acc;
  constexpr bool direct = Same<T, In>::value;  // then y is its own accumulator
  constexpr int64_t most_run = plan::packed_run(kWide<V>), most_rows = plan::packed_block(kWide<V>);
  if (depth == 0) return;  // nothing to add
  const bool wide = plan::worth_threads(width * depth * static_cast<int64_t>(sizeof(T)));
  const int64_t block = plan::packed_cols(width, kStrip<V>, kWide<V>), col_blocks = plan::ceil_div(width, block);
  const int64_t most = direct ? tokens : plan::kPackedConverted;
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t now = min64(most, tokens - first), blocks = plan::ceil_div(now, plan::kPackedTokens);
    const In** rows = scratch<const In*>(Scratch::call_pointers, now);
    In* buffer = direct ? nullptr : scratch<In>(Scratch::call_first, now * depth);
    parallel_tasks(plan::ceil_div(now, most_rows), wide && !direct, [&](int64_t task) {
      for (int64_t t = task * most_rows, end = min64(t + most_rows, now); t < end; ++t)
        rows[t] = row_as<V, T>(x + (first + t) * ldx, depth, direct ? nullptr : buffer + t * depth);
    });
    parallel_tasks(blocks * col_blocks, wide, [&](int64_t task) {
      const int64_t t0 = task / col_blocks * plan::kPackedTokens, t1 = min64(t0 + plan::kPackedTokens, now);
      const int64_t c0 = task % col_blocks * block, cols = min64(block, width - c0);
      In* packed = scratch<In>(Scratch::panel, most_run * block);
      Acc* sums = direct ? nullptr : scratch<Acc>(Scratch::tile, (t1 - t0) * cols);
      T* out = y + (first + t0) * width + c0;
      for (int64_t k0 = 0; k0 < depth; k0 += most_run) {
        const int64_t count = min64(most_run, depth - k0);
        for (int64_t c = 0; c < cols; c += kStrip<V>)
          pack(c0 + c, min64(kStrip<V>, cols - c), k0, count, packed + c * count);
        for (int64_t b0 = t0; b0 < t1; b0 += most_rows)
          for (int64_t c = 0; c < cols; c += kStrip<V>)
            for (int64_t t = b0, end = min64(b0 + most_rows, t1); t < end; t += V::kAxpyM) {
              const int64_t n = min64(V::kAxpyM, end - t), strip = min64(kStrip<V>, cols - c);
              const In* from = packed + c * count;
              if constexpr (direct) {
                panel_rows<V>(rows + t, n, k0, k0 + count, from, kStrip<V>, strip, true, out + (t - t0) * width + c,
                              width);
              } else {
                panel_rows<V>(rows + t, n, k0, k0 + count, from, kStrip<V>, strip, k0 > 0, sums + (t - t0) * cols + c,
                              cols);
              }
            }
      }
      for (int64_t t = 0; !direct && t < t1 - t0; ++t) {
        add_row(out + t * width, sums + t * cols, cols);
        convert_row(sums + t * cols, out + t * width, cols);
      }
    });
  }
}

template <class V, class T>
static void linear_packed(const LinearParams& p) {
  const T* weight = static_cast<const T*>(p.weight);
  packed_product<V>(static_cast<const T*>(p.x), p.ldx, p.tokens, p.in, static_cast<T*>(p.y), p.out,
                    [&](int64_t c0, int64_t cols, int64_t k0, int64_t count, typename V::In* to) {
                      transpose_as<V>(weight + c0 * p.ldw + k0, p.ldw, cols, count, to, kStrip<V>);
                    });
}

template <class V, class T>
static void linear_backward_packed(const LinearBackwardParams& p) {
  const T* weight = static_cast<const T*>(p.weight);
  packed_product<V>(static_cast<const T*>(p.dy), p.lddy, p.tokens, p.out, static_cast<T*>(p.dx), p.in,
                    [&](int64_t c0, int64_t cols, int64_t k0, int64_t count, typename V::In* to) {
                      const T* w = weight + k0 * p.ldw + c0;
                      for (int64_t k = 0; k < count; ++k) convert_row(w + k * p.ldw, to + k * kStrip<V>, cols);
                    });
}

#if defined(MOA_HAS_AMX_BF16)
// ---- many tokens in float32 on AMX: products of bfloat16 terms (terms.h) ---------------------------------------------
static void linear_terms(const LinearParams& p) {
  terms_product<true>(static_cast<const float*>(p.x), p.ldx, p.tokens, p.in, static_cast<const float*>(p.weight), p.ldw,
                      static_cast<float*>(p.y), p.out,
                      [&](int64_t t0, int64_t t1) { linear_tokens<F32, float>(p, t0, t1 - t0); });
}
static void linear_backward_terms(const LinearBackwardParams& p) {
  terms_product<false>(static_cast<const float*>(p.dy), p.lddy, p.tokens, p.out, static_cast<const float*>(p.weight),
                       p.ldw, static_cast<float*>(p.dx), p.in,
                       [&](int64_t t0, int64_t t1) { linear_backward_tokens<F32, float>(p, t0, t1 - t0); });
}
#endif

// ---- the choice ------------------------------------------------------------------------------------------------------
// The most tokens whose W is streamed, by instruction set and processor.
template <class V, class T>
static int64_t most_tokens(DType type) {
  const int64_t most = Same<T, typename V::In>::value ? V::kLinearTokens : INT64_MAX;
  return min64(most, plan::most_beside_library(type, processor()));
}

template <class V, class T>
static plan::Linear linear_form(DType type, int64_t tokens, int64_t in, int64_t out) {
  constexpr bool direct = Same<T, typename V::In>::value;
  if (V::kLinearTokens == 0) return plan::Linear::library;
  if (V::kTerms && direct && plan::uses_terms(tokens, in, out)) return plan::Linear::terms;
  if (V::kPacks && plan::packs(tokens, direct, kWide<V>, processor())) return plan::Linear::packed;
  return plan::few_tokens(tokens, in, most_tokens<V, T>(type), direct) ? plan::Linear::streamed : plan::Linear::library;
}

template <class V, class T>
static void linear(const LinearParams& p) {
  const plan::Linear form = linear_form<V, T>(p.type, p.tokens, p.in, p.out);
#if defined(MOA_HAS_AMX_BF16)
  if (form == plan::Linear::terms) return linear_terms(p);
#endif
  if constexpr (V::kPacks)
    if (form == plan::Linear::packed) return linear_packed<V, T>(p);
  if constexpr (V::kLinearTokens > 0)
    for (int64_t t = 0; t < p.tokens; t += plan::kLinearBlock)
      linear_tokens<V, T>(p, t, min64(plan::kLinearBlock, p.tokens - t));
}

// False, and nothing done, where the library's GEMM is as fast.
template <class V, class T>
static bool linear_backward(const LinearBackwardParams& p) {
  constexpr bool direct = Same<T, typename V::In>::value;
  if (V::kLinearTokens == 0) return false;
#if defined(MOA_HAS_AMX_BF16)
  if (V::kTerms && direct && plan::uses_terms_backward(p.tokens, p.in, p.out)) {
    linear_backward_terms(p);
    return true;
  }
#endif
  if constexpr (V::kPacks)
    if (plan::packs_backward(p.tokens, direct, kWide<V>, processor())) {
      linear_backward_packed<V, T>(p);
      return true;
    }
  const bool fast_gemv = plan::fast_gemv(p.type, processor());
  if (!plan::few_tokens_backward(p.tokens, p.out, most_tokens<V, T>(p.type), direct, fast_gemv)) return false;
  if (p.out % V::kPack != 0) return false;  // the last pair would reach into the next row of dy
  for (int64_t t = 0; t < p.tokens; t += plan::kLinearBlock)
    linear_backward_tokens<V, T>(p, t, min64(plan::kLinearBlock, p.tokens - t));
  return true;
}

}  // namespace MOA_ISA
}  // namespace moa
