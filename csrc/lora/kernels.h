// Shrink, expand-combine and gram on a CPU, over the tiles of micro.h. Equations and shapes: lora.h.
// Included only by csrc/isa/kernels.cpp, once per instruction set.
#pragma once
#include "common/parallel.h"
#include "common/scratch.h"
#include "lora/lora.h"
#include "lora/micro.h"
#include "lora/plan.h"

namespace moa {
namespace MOA_ISA {

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// First position in [begin, end) whose slot is >= slot: positions of one expert ascend by slot.
static inline int64_t first_slot(const int32_t* order, int64_t begin, int64_t end, int64_t slot) {
  while (begin < end) {
    const int64_t mid = (begin + end) / 2;
    if (order[mid] < slot) {
      begin = mid + 1;
    } else {
      end = mid;
    }
  }
  return begin;
}
// Expert whose segment holds position p.
static inline int64_t expert_at(const Segments& s, int64_t p) {
  int64_t lo = 0, hi = s.experts;
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    if (s.offsets[mid] <= p) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

// A row of storage type T as the In elements of V: the row itself where they are the same type, else converted.
template <class V, class T>
static inline const typename V::In* row_as(const T* row, int64_t n, typename V::In* buffer) {
  if constexpr (Same<T, typename V::In>::value) {
    return row;
  } else {
    convert_row(row, buffer, n);
    return buffer;
  }
}

// ---- expand-combine --------------------------------------------------------------------------------------------------
// y[t][:] = base[t] + bias + sum over the token's slots of coef[p][:] times the expert's panel.
// Experts with depth(e) = 0 take no part. panel(e, col, cols, rows) sets the pointers to the expert's rows of packs, each `cols` packs long, and returns how
// many there are; fetch(e, col, cols) is the memory it will read, prefetched while the expert before is at work. coef:
// [slots, ldc] in sorted order, weight and scale folded in.
template <class V, class T, class Depth, class Panel, class Fetch>
static void expand(const Segments& s, const typename V::In* coef, int64_t ldc, int64_t width, T* y, const T* base,
                   int64_t ldbase, const T* bias, const Depth& depth, const Panel& panel, const Fetch& fetch) {
  using Acc = typename V::Acc;
  using In = typename V::In;
  const plan::Expand plan = plan::expand(s.tokens, s.top_k, s.experts, width);
  const int64_t token_blocks = plan::ceil_div(s.tokens, plan.token_block);
  const int64_t col_blocks = plan::ceil_div(width, plan.col_block);
  const int64_t bytes = s.tokens * width * 4 + min64(s.slots(), s.experts) * ldc * width * 4;

  parallel_tasks(token_blocks * col_blocks, plan::worth_threads(bytes), [&](int64_t task) {
    const int64_t t0 = task / col_blocks * plan.token_block, t1 = min64(t0 + plan.token_block, s.tokens);
    const int64_t c0 = task % col_blocks * plan.col_block, cols = min64(plan.col_block, width - c0);
    // Accumulators of their own, packed: y's rows are often a power of two apart, and then share few cache sets.
    Acc* tile = scratch<Acc>(Scratch::tile, (plan.token_block + 1) * plan.col_block);
    Acc* start = tile + plan.token_block * plan.col_block;
    if (bias != nullptr) {
      convert_row(bias + c0, start, cols);
    } else {
      memset(start, 0, cols * sizeof(Acc));
    }
    for (int64_t t = t0; t < t1; ++t) memcpy(tile + (t - t0) * cols, start, cols * sizeof(Acc));

    auto segment = [&](int64_t e, int64_t* p0, int64_t* p1) {  // the expert's slots among this block's tokens
      *p0 = s.offsets[e];
      *p1 = depth(e) > 0 ? s.offsets[e + 1] : *p0;
      if (token_blocks == 1 || *p0 == *p1) return;
      *p0 = first_slot(s.order, *p0, *p1, t0 * s.top_k);
      *p1 = first_slot(s.order, *p0, *p1, t1 * s.top_k);
    };
    int64_t touched = t0, seen = 0;  // rows of y asked for so far, slots done
    const int64_t expected = (t1 - t0) * s.slots() / s.tokens + 1;
    int64_t e = 0, p0 = 0, p1 = 0;
    for (; e < s.experts && p0 == p1; ++e) segment(e, &p0, &p1);
    const int64_t first = e - 1;
    while (p0 < p1) {
      const int64_t expert = e - 1;
      int64_t next0 = 0, next1 = 0;
      for (; e < s.experts && next0 == next1; ++e) segment(e, &next0, &next1);
      const In** b = scratch<const In*>(Scratch::pointers, ldc);
      const int64_t k_size = panel(expert, c0, cols, b);
      // The next expert of this task, else the first of the next task, which is this thread's as a rule.
      const bool wrap = next0 == next1;
      Ahead ahead = wrap && c0 + cols >= width ? Ahead(coef, 0)
                                               : fetch(wrap ? first : e - 1, wrap ? c0 + cols : c0,
                                                       wrap ? min64(plan.col_block, width - c0 - cols) : cols);
      const int64_t share = (ahead.end - ahead.at) / plan::ceil_div(p1 - p0, V::kAxpyM) + 64;
      for (int64_t p = p0; p < p1;) {
        Acc* rows[V::kAxpyM];
        int m = 0;
        int64_t last = -1;
        for (; m < V::kAxpyM && p + m < p1; ++m) {
          const int64_t t = s.order[p + m] / s.top_k;
          if (t == last) break;  // one token twice under one expert: the second adds after the first is stored
          last = t;
          rows[m] = tile + (t - t0) * cols;
        }
        ahead.take(share);
        axpy_block<V>(m, rows, coef + p * ldc, ldc, V::kPack, b, k_size, cols);
        p += m;
        seen += m;
        // y's lines come in for writing while the sums are made.
        for (const int64_t due = min64(t1, t0 + (t1 - t0) * seen / expected); touched < due; ++touched)
          for (int64_t c = 0; c < cols; c += 64 / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(y + touched * width + c0 + c, 1, 2);
      }
      p0 = next0;
      p1 = next1;
    }
    for (int64_t t = t0; t < t1; ++t) {
      Acc* row = tile + (t - t0) * cols;
      if (base != nullptr) add_row(base + t * ldbase + c0, row, cols);
      convert_row(row, y + t * width + c0, cols);
    }
  });
}

// ---- gram ------------------------------------------------------------------------------------------------------------
// G_e[j][:] = sum over the expert's slots of coef[p][j] * row(p)[:], j < depth(e), for the columns of one task.
// store(e, col, cols, tile) takes each finished tile, [depth] x cols of Acc; tiles of empty experts are zeros.
template <class V, class T, class Depth, class Store>
static void gram(const Segments& s, const typename V::In* coef, int64_t ldc, const T* x, int64_t ldx, int64_t width,
                 const Depth& depth, const Store& store) {
  using Acc = typename V::Acc;
  using In = typename V::In;
  const int64_t block = plan::gram_cols(width);
  const int64_t n = s.slots();
  parallel_tasks(plan::ceil_div(width, block), plan::worth_threads(n * width * 4), [&](int64_t task) {
    const int64_t c0 = task * block, cols = min64(block, width - c0);
    Acc* tile = scratch<Acc>(Scratch::tile, 2 * ldc * block);
    Acc* run_tile = tile + ldc * block;
    for (int64_t e = 0; e < s.experts; ++e) {
      const int64_t p0 = s.offsets[e], p1 = s.offsets[e + 1], rank = depth(e);
      memset(tile, 0, rank * cols * sizeof(Acc));
      for (int64_t p = p0; rank > 0 && p < p1; p += plan::kGramRun) {
        const int64_t run = min64(plan::kGramRun, p1 - p);
        const int64_t steps = plan::ceil_div(run, V::kPack);
        Acc* out = p == p0 ? tile : run_tile;
        if (p != p0) memset(out, 0, rank * cols * sizeof(Acc));
        // Rows of the panel: slots, or pairs of slots interleaved; coefficients to match.
        const In** rows = scratch<const In*>(Scratch::pointers, steps);
        const In* w = coef + p * ldc;
        int64_t cm = 1, ck = ldc;
        if constexpr (V::kPack == 1) {
          constexpr bool same = Same<T, In>::value;
          In* buffer = same ? nullptr : scratch<In>(Scratch::rows, run * cols);
          for (int64_t i = 0; i < run; ++i)
            rows[i] = row_as<V, T>(x + (s.order[p + i] / s.top_k) * ldx + c0, cols, buffer + (same ? 0 : i * cols));
        } else {
          In* buffer = scratch<In>(Scratch::rows, steps * cols * 2);
          In* pairs = scratch<In>(Scratch::convert, steps * ldc * 2);
          for (int64_t i = 0; i < steps; ++i) {
            const int64_t a = p + 2 * i, b = a + 1;
            const T* xa = x + (s.order[a] / s.top_k) * ldx + c0;
            const T* xb = b < p + run ? x + (s.order[b] / s.top_k) * ldx + c0 : nullptr;
            interleave(xa, xb, cols, buffer + i * cols * 2);
            interleave(coef + a * ldc, xb != nullptr ? coef + b * ldc : nullptr, ldc, pairs + i * ldc * 2);
            rows[i] = buffer + i * cols * 2;
          }
          w = pairs;
          cm = 2;
          ck = 2 * ldc;
        }
        for (int64_t j = 0; j < rank; j += V::kAxpyM) {
          Acc* c[V::kAxpyM];
          const int m = static_cast<int>(min64(V::kAxpyM, rank - j));
          for (int i = 0; i < m; ++i) c[i] = out + (j + i) * cols;
          axpy_block<V>(m, c, w + j * cm, cm, ck, rows, steps, cols);
        }
        if (p != p0)
          for (int64_t i = 0; i < rank * cols; ++i) tile[i] += run_tile[i];
      }
      store(e, c0, cols, tile);
    }
  });
}

}  // namespace MOA_ISA
}  // namespace moa
