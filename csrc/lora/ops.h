// Forward and backward of a segment LoRA from the three kernels, for one storage type of x and one of the adapters.
// Included only by csrc/isa/kernels.cpp, once per instruction set.
#pragma once
#include "lora/slots.h"

namespace moa {
namespace MOA_ISA {

// V: arithmetic; TX: storage of x, y, dy, dx; TA: storage of lora_A, lora_B and their gradients.
template <class V, class TX, class TA>
struct Lora : Slots<V, TX, TA> {
  using In = typename V::In;
  using Acc = typename V::Acc;
  using Own = Slots<V, TX, TA>;
  using Own::A, Own::B, Own::kDirect, Own::p, Own::rank_of;
  using Own::a_across, Own::a_panel, Own::a_rows, Own::b_across, Own::b_columns, Own::b_ld, Own::b_panel;
  using Own::by_panel, Own::each_slot, Own::shrink;
  using Own::coef_ld, Own::coefficient, Own::coefficient_bytes, Own::coefficients, Own::kRouterTerms, Own::kSpare;
  using Own::Own;

  void forward(const ForwardParams& f) const {
    const Segments& s = p.seg;
    Acc* h = static_cast<Acc*>(f.h);
    const int64_t n = s.slots();
    const bool turned = by_panel(n, p.rank, false);
    const int64_t most = turned ? plan::kSlotsTurned : V::kTiles ? plan::kSlotsRepacked : plan::kSlotsInPlace;
    In* coef = scratch<In>(Scratch::call_first, (n + kSpare) * coef_ld(false));
    shrink(
        static_cast<const TX*>(p.x), p.ldx, p.in, h, plan::shrink(n, p.rank, most), p.in, /*turned=*/false,
        [&](int64_t e, int64_t j0, int64_t j1) { return a_rows(e, j0, j1); },
        [&](int64_t e, int64_t j0, int64_t j1, int64_t k0, int64_t count) { return a_across(e, j0, j1, k0, count); },
        [&](int64_t e, int64_t j0, int64_t j1) {
          return Ahead(A + (e * p.rank + j0) * p.in, (j1 - j0) * p.in * static_cast<int64_t>(sizeof(TA)));
        },
        coefficient_bytes(false), [&](int64_t e, int64_t q) { coefficient(h, nullptr, false, coef, e, q); });
    const int64_t unused = s.tokens * s.top_k - n;
    if (unused > 0) memset(h + n * p.rank, 0, unused * p.rank * sizeof(Acc));
    if constexpr (kDirect || V::kWidens)
      if (plan::along_ranks(s.tokens, p.rank)) return expand_along_ranks(f, coef);
    expand<V, TX>(
        s, coef, coef_ld(false), p.out, static_cast<TX*>(f.y), static_cast<const TX*>(f.base), f.ldbase,
        static_cast<const TX*>(f.bias), [&](int64_t e) { return rank_of(e); },
        [&](int64_t e, int64_t c0, int64_t cols, const In** rows) { return b_panel(e, c0, cols, rows); },
        [&](int64_t e, int64_t c0, int64_t cols) {
          return Ahead(B + (e * p.out + c0) * p.rank, cols * p.rank * static_cast<int64_t>(sizeof(TA)));
        });
  }

  // The expand of so few tokens that B is read as it lies: y[t][o] = start + sum <B_e[o], coef[p]>.
  void expand_along_ranks(const ForwardParams& f, const In* coef) const {
    const Segments& s = p.seg;
    const int64_t ldc = coef_ld(false), block = plan::gram_cols(p.out);
    TX* y = static_cast<TX*>(f.y);
    const bool wide = plan::worth_threads(s.slots() * p.rank * p.out * static_cast<int64_t>(sizeof(In)));
    parallel_tasks(plan::ceil_div(p.out, block), wide, [&](int64_t task) {
      const int64_t c0 = task * block, cols = min64(block, p.out - c0);
      Acc* sums = scratch<Acc>(Scratch::tile, (s.tokens + 1) * cols);
      Acc* products = sums + s.tokens * cols;
      memset(sums, 0, s.tokens * cols * sizeof(Acc));
      for (int64_t t = 0; t < s.tokens; ++t) {
        if (f.bias != nullptr) add_row(static_cast<const TX*>(f.bias) + c0, sums + t * cols, cols);
        if (f.base != nullptr) add_row(static_cast<const TX*>(f.base) + t * f.ldbase + c0, sums + t * cols, cols);
      }
      for (int64_t e = 0; e < s.experts; ++e)
        for (int64_t q = s.offsets[e]; rank_of(e) > 0 && q < s.offsets[e + 1]; ++q) {
          const In* row = coef + q * ldc;
          const TA* rows_B = B + (e * p.out + c0) * p.rank;
          dot_block<V>(&row, 1, 0, rows_B, p.rank, cols, rank_of(e), products, cols, false, Ahead(row, 0));
          add_row(products, sums + s.order[q] / s.top_k * cols, cols);
        }
      for (int64_t t = 0; t < s.tokens; ++t) convert_row(sums + t * cols, y + t * p.out + c0, cols);
    });
  }

  // u = dy B and dw = s <h, u>.
  void backward_shrink(const BackwardParams& b) const {
    const Segments& s = p.seg;
    const int64_t n = s.slots();
    Acc* u = static_cast<Acc*>(b.u);
    const plan::Shrink plan = plan::shrink(n, p.rank, plan::kSlotsRepacked);
    const Acc* h = static_cast<const Acc*>(b.h);
    Acc* dw = static_cast<Acc*>(b.dw);
    const int64_t bytes = dw == nullptr ? 0 : 2 * p.rank * static_cast<int64_t>(sizeof(Acc));
    const auto weight = [&](int64_t e, int64_t q) {
      if (dw != nullptr)
        dw[s.order[q]] = static_cast<Acc>(p.scale[e]) * dot_row(h + q * p.rank, u + q * p.rank, p.rank);
    };
    if (kDirect && Same<TX, In>::value && plan::backward_along_ranks(n, p.rank)) {
      backward_shrink_along_ranks(b);
      each_slot(bytes, weight);
    } else {
      shrink(
          static_cast<const TX*>(b.dy), b.lddy, p.out, u, plan, b_ld(), /*turned=*/true,
          [&](int64_t e, int64_t j0, int64_t j1) { return b_columns(e, j0, j1); },
          [&](int64_t e, int64_t j0, int64_t j1, int64_t o0, int64_t count) { return b_across(e, j0, j1, o0, count); },
          [&](int64_t e, int64_t, int64_t) {  // the ranks of a row stand side by side
            return Ahead(B + e * p.out * p.rank, p.rank * p.out * static_cast<int64_t>(sizeof(TA)));
          },
          bytes, weight);
    }
    for (int64_t q = n; dw != nullptr && q < s.tokens * s.top_k; ++q) dw[s.order[q]] = Acc(0);
  }

  // The same of so few tokens that B is read as it lies: runs of outputs, each summed on its own, then added in order.
  void backward_shrink_along_ranks(const BackwardParams& b) const {
    const Segments& s = p.seg;
    const int64_t n = s.slots(), size = n * p.rank, runs = plan::ceil_div(p.out, plan::kShrinkRun);
    Acc* parts = scratch<Acc>(Scratch::call_first, (runs + 1) * size);
    Acc* zeros = parts + runs * size;
    memset(zeros, 0, size * sizeof(Acc));
    const bool wide = plan::worth_threads(n * p.rank * p.out * static_cast<int64_t>(sizeof(In)));
    parallel_tasks(runs, wide, [&](int64_t task) {
      const int64_t o0 = task * plan::kShrinkRun, run = min64(plan::kShrinkRun, p.out - o0);
      const int64_t steps = plan::ceil_div(run, V::kPack), ld = steps * V::kPack;
      const In** rows = scratch<const In*>(Scratch::pointers, steps);
      In* dy = scratch<In>(Scratch::rows, V::kAxpyM * ld);  // of a group of slots, side by side
      In* pairs = V::kPack == 1 ? nullptr : scratch<In>(Scratch::panel, ld * p.rank);
      for (int64_t e = 0; e < s.experts; ++e) {
        if (s.offsets[e] == s.offsets[e + 1]) continue;
        const In* rows_B = reinterpret_cast<const In*>(B + (e * p.out + o0) * p.rank);
        for (int64_t k = 0; k < steps; ++k) {
          if constexpr (V::kPack == 1) {
            rows[k] = rows_B + k * p.rank;
          } else {
            const In* first = rows_B + 2 * k * p.rank;
            interleave(first, 2 * k + 1 < run ? first + p.rank : nullptr, p.rank, pairs + 2 * k * p.rank);
            rows[k] = pairs + 2 * k * p.rank;
          }
        }
        for (int64_t q = s.offsets[e], end = s.offsets[e + 1]; q < end;) {
          const Acc* from[V::kAxpyM];
          Acc* to[V::kAxpyM];
          int m = 0;
          for (; m < V::kAxpyM && q < end; ++m, ++q) {
            from[m] = zeros;
            to[m] = parts + task * size + q * p.rank;
            memset(to[m], 0, p.rank * sizeof(Acc));  // the ranks that the expert has not
            memcpy(dy + m * ld, static_cast<const In*>(b.dy) + s.order[q] / s.top_k * b.lddy + o0, run * sizeof(In));
            if (run < ld) dy[m * ld + run] = In{};
          }
          Ahead none(dy, 0);
          axpy_block<V>(m, from, to, dy, ld, V::kPack, rows, steps, rank_of(e), &none);
        }
      }
    });
    Acc* u = static_cast<Acc*>(b.u);
    memcpy(u, parts, size * sizeof(Acc));
    for (int64_t task = 1; task < runs; ++task) add_row(parts + task * size, u, size);
  }

  // dB of an expert of few slots, along its rows: dB[o][:] = sum dy[p][o] coef[p][:], the same products in the same order
  // without a transposition, which costs more than they do. Two at a time: two rows of dy are always one distance apart,
  // as the tile wants them.
  bool few_slots_dB(const BackwardParams& b, const In* coef, TA* dB, int64_t e, int64_t c0, int64_t cols) const {
    if constexpr (V::kPack == 1 && kDirect && Same<TX, In>::value && Same<TA, Acc>::value) {
      const Segments& s = p.seg;
      const int64_t p0 = s.offsets[e], p1 = s.offsets[e + 1];
      if (rank_of(e) < p.rank) return false;
      const TX* dy = static_cast<const TX*>(b.dy) + c0;
      if constexpr (V::kPanels && !V::kStrips) {
        constexpr int M = 16;
        if (cols % M == 0 && plan::gram_outer(p1 - p0, p.rank, V::kIn, processor())) {
          const In** rows = scratch<const In*>(Scratch::pointers, p1 - p0);
          for (int64_t q = p0; q < p1; ++q) rows[q - p0] = dy + s.order[q] / s.top_k * b.lddy;
          const auto tile = p.rank == V::kIn ? outer_tile<V, M, false> : outer_tile<V, M, true>;
          for (int64_t o = 0; o < cols; o += M)
            tile(rows, o, p1 - p0, coef + p0 * coef_ld(false), coef_ld(false), static_cast<int>(p.rank),
                 dB + (e * p.out + c0 + o) * p.rank, p.rank);
          return true;
        }
      }
      if (p1 - p0 > plan::kGramFewSlots) return false;
      Acc* zeros = scratch<Acc>(Scratch::convert, p.rank);
      memset(zeros, 0, p.rank * sizeof(Acc));
      Ahead none(coef, 0);
      for (int64_t q = p0; q < p1; q += 2) {
        const int64_t n = min64(2, p1 - q), first = s.order[q] / s.top_k, second = s.order[q + n - 1] / s.top_k;
        const In* rows[2] = {coef + q * coef_ld(false), coef + (q + n - 1) * coef_ld(false)};
        for (int64_t o = 0; o < cols; o += V::kAxpyM) {
          const int m = static_cast<int>(min64(V::kAxpyM, cols - o));
          const Acc* from[V::kAxpyM];
          Acc* to[V::kAxpyM];
          for (int i = 0; i < m; ++i) {
            to[i] = dB + (e * p.out + c0 + o + i) * p.rank;
            from[i] = q == p0 ? zeros : to[i];
          }
          axpy_block<V>(m, from, to, dy + first * b.lddy + o, 1, (second - first) * b.lddy, rows, n, p.rank, &none);
        }
      }
      return true;
    } else if constexpr (Same<Acc, float>::value && !Same<TA, Acc>::value) {  // in floats, rounded once
      constexpr int M = F32::kAxpyM;
      const Segments& s = p.seg;
      const int64_t p0 = s.offsets[e], n = s.offsets[e + 1] - p0;
      if (n > plan::kGramFewSlots || rank_of(e) < p.rank) return false;
      float* wide = scratch<float>(Scratch::convert, (plan::kGramFewSlots + M + 1) * p.rank);
      float* sums = wide + plan::kGramFewSlots * p.rank;
      float* zeros = sums + M * p.rank;
      memset(zeros, 0, p.rank * sizeof(float));
      float* dy = scratch<float>(Scratch::rows, n * cols);
      const float* rows[plan::kGramFewSlots];
      for (int64_t i = 0; i < n; ++i) {
        convert_row(coef + (p0 + i) * coef_ld(false), wide + i * p.rank, p.rank);
        convert_row(static_cast<const TX*>(b.dy) + s.order[p0 + i] / s.top_k * b.lddy + c0, dy + i * cols, cols);
        rows[i] = wide + i * p.rank;
      }
      Ahead none(dy, 0);
      for (int64_t o = 0; o < cols; o += M) {
        const int m = static_cast<int>(min64(M, cols - o));
        const float* from[M];
        float* to[M];
        for (int i = 0; i < m; ++i) {
          from[i] = zeros;
          to[i] = sums + i * p.rank;
        }
        axpy_block<F32>(m, from, to, dy + o, 1, cols, rows, n, p.rank, &none);
        convert_row(sums, dB + (e * p.out + c0 + o) * p.rank, m * p.rank);
      }
      return true;
    } else {
      return false;
    }
  }

  // dx, dA, dB and the router's weight gradient.
  void backward_outer(const BackwardParams& b) const {
    const Segments& s = p.seg;
    const int64_t n = s.slots();
    const Acc* dz = static_cast<const Acc*>(b.dz);
    const bool router = dz != nullptr;
    const int64_t ldc = coef_ld(router), router_at = round_up(p.rank, V::kPack);
    if (b.dx != nullptr || b.dA != nullptr || b.d_router != nullptr) {
      In* coef = scratch<In>(Scratch::call_first, (n + kSpare) * ldc);
      coefficients(static_cast<const Acc*>(b.u), dz, router, coef);
      const Acc* router_weight = router ? static_cast<const Acc*>(b.router_weight) : nullptr;
      if (b.dx != nullptr)
        expand<V, TX>(
            s, coef, ldc, p.in, static_cast<TX*>(b.dx), nullptr, 0, nullptr,
            [&](int64_t e) { return router ? router_at + 1 : rank_of(e); },
            [&](int64_t e, int64_t c0, int64_t cols, const In** rows) {
              return a_panel(e, c0, cols, rows, router_weight);
            },
            [&](int64_t e, int64_t c0, int64_t cols) {
              const bool fetched = V::kPack == 1 && plan::rows_fetch(processor());
              constexpr int64_t size = sizeof(TA);
              return Ahead(A + e * p.rank * p.in + c0, fetched ? cols * size : 0, p.in * size);
            });
      if (b.dA != nullptr || b.d_router != nullptr) {
        TA* dA = static_cast<TA*>(b.dA);
        Acc* d_router = static_cast<Acc*>(b.d_router);
        gram<V, TX>(
            s, coef, ldc, static_cast<const TX*>(p.x), p.ldx, p.in,
            [&](int64_t e) { return router ? router_at + kRouterTerms : rank_of(e); },
            [&](int64_t e, int64_t j, int64_t c0) -> Acc* {
              if constexpr (Same<TA, Acc>::value)
                if (dA != nullptr && j < rank_of(e)) return dA + (e * p.rank + j) * p.in + c0;
              return d_router != nullptr && j == router_at ? d_router + e * p.in + c0 : nullptr;
            },
            [&](int64_t e, int64_t c0, int64_t cols, const Acc* tile) {
              const int64_t used = rank_of(e);
              for (int64_t j = 0; dA != nullptr && j < p.rank; ++j) {
                TA* row = dA + (e * p.rank + j) * p.in + c0;
                if (j >= used) {
                  memset(row, 0, cols * sizeof(TA));
                } else if constexpr (!Same<TA, Acc>::value) {
                  convert_row(tile + j * cols, row, cols);
                }
              }
              for (int64_t i = 1; d_router != nullptr && i < kRouterTerms; ++i)
                add_row(tile + (router_at + i) * cols, d_router + e * p.in + c0, cols);
            },
            [&](int64_t, int64_t, int64_t) { return Ahead(A, 0); },
            [&](int64_t e) {
              if (dA != nullptr) memset(dA + e * p.rank * p.in, 0, p.rank * p.in * sizeof(TA));
              if (d_router != nullptr) memset(d_router + e * p.in, 0, p.in * sizeof(Acc));
            },
            [](int64_t, int64_t, int64_t) { return false; });
      }
    }
    if (b.dB == nullptr) return;
    In* coef = scratch<In>(Scratch::call_first, n * coef_ld(false));
    coefficients(static_cast<const Acc*>(b.h), nullptr, false, coef);
    TA* dB = static_cast<TA*>(b.dB);
    gram<V, TX>(
        s, coef, coef_ld(false), static_cast<const TX*>(b.dy), b.lddy, p.out, [&](int64_t e) { return rank_of(e); },
        [](int64_t, int64_t, int64_t) -> Acc* { return nullptr; },  // stored across
        [&](int64_t e, int64_t c0, int64_t cols, Acc* tile) {
          TA* out = dB + (e * p.out + c0) * p.rank;
          for (int64_t i = rank_of(e) * cols; i < p.rank * cols; ++i) tile[i] = Acc(0);
          if constexpr (Same<TA, Acc>::value) {
            transpose(tile, cols, p.rank, cols, out, p.rank);
          } else {
            Acc* turned = scratch<Acc>(Scratch::convert, cols * p.rank);
            transpose(tile, cols, p.rank, cols, turned, p.rank);
            convert_row(turned, out, cols * p.rank);
          }
        },
        [&](int64_t e, int64_t c0, int64_t cols) {
          const int64_t bytes = cols * p.rank * static_cast<int64_t>(sizeof(TA));
          return Ahead(dB + (e * p.out + c0) * p.rank, plan::rows_fetch(processor()) ? bytes : 0);
        },
        [&](int64_t e) { memset(dB + e * p.out * p.rank, 0, p.out * p.rank * sizeof(TA)); },
        [&](int64_t e, int64_t c0, int64_t cols) { return few_slots_dB(b, coef, dB, e, c0, cols); });
  }
};

}  // namespace MOA_ISA
}  // namespace moa
