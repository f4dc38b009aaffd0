// What is done slot by slot: shrink, and the coefficients of expand and gram. Included only by ops.h.
#pragma once
#include "lora/kernels.h"
#include "lora/operands.h"

namespace moa {
namespace MOA_ISA {

// V: arithmetic; TX: storage of x, y, dy, dx; TA: storage of lora_A, lora_B and their gradients.
template <class V, class TX, class TA>
struct Slots : Operands<V, TA> {
  using In = typename V::In;
  using Acc = typename V::Acc;
  using Own = Operands<V, TA>;
  using Own::Own;
  using Own::p, Own::rank_of;

  // The router's coefficient takes part in whole packs after the ranks. It has float32 accuracy, which three bfloat16
  // terms give: their products with a bfloat16 x are exact. dx is bfloat16 itself, and two terms, one pack, are enough.
  static constexpr int64_t kRouterTerms = V::kPack == 2 ? 3 : 1;
  static constexpr int64_t kSpare = V::kTiles ? 15 : 0;  // rows behind the coefficients that a tile may read
  int64_t coef_ld(bool router) const {
    return round_up(p.rank, V::kPack) + (router ? round_up(kRouterTerms, V::kPack) : 0);
  }

  // ---- shrink over all slots: out[pos][j] = <row of pos, panel row j>; unused ranks are zero ----
  // panel(e, j0, j1): rows j0 to j1 of the expert, ld_panel apart; across(e, j0, j1, k0, count): `count` rows of
  // their transpose, which lies ready where it is `turned`; fetch(e, j0, j1): the memory they will read. finish(e, pos):
  // what is then done to a slot, while its row is in the cache where a task has all of it; its bytes: each_slot's.
  template <class PanelRows, class Across, class Fetch, class Finish>
  void shrink(const TX* x, int64_t ldx, int64_t k_size, Acc* out, const plan::Shrink& plan, int64_t ld_panel,
              bool turned, const PanelRows& panel, const Across& across, const Fetch& fetch, int64_t finish_bytes,
              const Finish& finish) const {
    constexpr bool direct = Same<TX, In>::value;
    const Segments& s = p.seg;
#if defined(MOA_HAS_AMX_BF16)
    if constexpr (V::kTiles) {
      int64_t groups = 0;
      for (int64_t e = 0; e < s.experts; ++e) groups += plan::ceil_div(rank_of(e), 16);
      if (plan::dense_shrink(s.tokens, s.top_k, s.experts, groups)) {
        dense_shrink(s, x, ldx, k_size, out, p.rank, ld_panel, [&](int64_t e) { return rank_of(e); }, panel);
        return each_slot(finish_bytes, finish);
      }
    }
#endif
    const TokenAt token_at(s);
    const int64_t n = s.slots(), chunks = plan::ceil_div(n, plan.slots);
    const int64_t splits = plan::ceil_div(p.rank, plan.rank_split);
    const bool wide = plan::worth_threads((n + min64(n, s.experts) * p.rank) * k_size * sizeof(In));
    const bool x_outer = k_size * V::kDotM * static_cast<int64_t>(sizeof(In)) <= plan::kL1;
    parallel_tasks(chunks * splits, wide, [&](int64_t task) {
      // A task begins with its expert, if that is near: one expert's rows are not read by two.
      const auto bound = [&](int64_t i) {
        const int64_t at = min64(i * plan.slots, n), start = at < n ? s.offsets[expert_at(s, at)] : at;
        return at - start <= plan.slots / 2 ? start : at;
      };
      const int64_t begin = bound(task / splits), end = bound(task / splits + 1);
      const int64_t j0 = task % splits * plan.rank_split, j1 = min64(j0 + plan.rank_split, p.rank);
      // Rows of this task, and where they can be read in place, of the next one's first tile.
      const int64_t known = direct ? min64(end + V::kDotM, n) : end;
      const In** rows = scratch<const In*>(Scratch::pointers, known - begin);
      In* buffer = direct ? nullptr : scratch<In>(Scratch::rows, (end - begin) * k_size);
      for (int64_t q = begin; q < known; ++q)
        rows[q - begin] =
            row_as<V, TX>(x + token_at(q) * ldx, k_size, direct ? nullptr : buffer + (q - begin) * k_size);
      int64_t pos = begin;
      for (int64_t e = expert_at(s, pos); pos < end; ++e) {
        const int64_t stop = min64(s.offsets[e + 1], end), used = min64(rank_of(e), j1);
        if (stop <= pos) continue;
        int64_t next = e + 1;  // with slots: of few tokens most experts have none
        while (next < s.experts && s.offsets[next + 1] <= stop) ++next;
        const bool more = next < s.experts && rank_of(next) > j0;
        bool done = used <= j0;
        if constexpr (V::kPanels)
          if (!done && by_panel(stop - pos, used - j0, turned)) {
            panel_block<V>(rows + (pos - begin), stop - pos, used - j0, k_size, out + pos * p.rank + j0, p.rank,
                           [&](int64_t k0, int64_t count) { return across(e, j0, used, k0, count); });
            done = true;
          }
        if (!done)
          dot_block<V>(rows + (pos - begin), stop - pos, known - stop, panel(e, j0, used), ld_panel, used - j0, k_size,
                       out + pos * p.rank + j0, p.rank, x_outer,
                       more ? fetch(next, j0, min64(rank_of(next), j1)) : Ahead(out, 0));
        for (int64_t q = pos; q < stop; ++q)
          for (int64_t j = used > j0 ? used : j0; j < j1; ++j) out[q * p.rank + j] = Acc(0);
        for (int64_t q = pos; splits == 1 && q < stop; ++q) finish(e, q);
        pos = stop;
      }
    });
    if (splits > 1) each_slot(finish_bytes, finish);
  }

  static bool by_panel(int64_t slots, int64_t ranks, bool turned) {
    if (V::kStrips) return plan::shrink_strips(slots, ranks);
    return V::kPanels && plan::shrink_panel(slots, ranks, turned, processor());
  }

  // fn(expert, position) for every slot, which reads or writes so many bytes.
  template <class F>
  void each_slot(int64_t bytes, const F& fn) const {
    const Segments& s = p.seg;
    const int64_t n = s.slots();
    parallel_tasks(plan::ceil_div(n, plan::kSlots), plan::worth_threads(n * bytes), [&](int64_t task) {
      int64_t q = task * plan::kSlots;
      const int64_t end = min64(q + plan::kSlots, n);
      for (int64_t e = expert_at(s, q); q < end; ++e)
        for (; q < min64(s.offsets[e + 1], end); ++q) fn(e, q);
    });
  }

  // coef[pos][:] = weight * scale * h[pos][:], then the router's coefficient; what pads a pack is zero.
  void coefficient(const Acc* h, const Acc* dz, bool router, In* coef, int64_t e, int64_t q) const {
    constexpr int64_t kRanks = 64;
    const int64_t ldc = coef_ld(router), ranks_end = round_up(p.rank, V::kPack);
    const Acc w = static_cast<const Acc*>(p.weights)[p.seg.order[q]] * static_cast<Acc>(p.scale[e]);
    In* c = coef + q * ldc;
    const Acc* row = h + q * p.rank;
    if constexpr (Same<In, Acc>::value) {
      for (int64_t j = 0; j < p.rank; ++j) c[j] = w * row[j];
    } else {
      for (int64_t j0 = 0; j0 < p.rank; j0 += kRanks) {
        Acc scaled[kRanks];
        const int64_t ranks = min64(kRanks, p.rank - j0);
        for (int64_t j = 0; j < ranks; ++j) scaled[j] = w * row[j0 + j];
        convert_row(scaled, c + j0, ranks);
      }
    }
    for (int64_t j = p.rank; j < ldc; ++j) from_acc(Acc(0), c + j);
    Acc rest = router ? dz[q] : Acc(0);
    for (int64_t i = 0; router && i < kRouterTerms; ++i) {
      from_acc(rest, c + ranks_end + i);
      rest -= to_acc(c[ranks_end + i]);
      if (rest != rest) rest = Acc(0);  // the first term was infinite, or NaN, and says so
    }
  }
  int64_t coefficient_bytes(bool router) const { return coef_ld(router) * static_cast<int64_t>(sizeof(Acc)); }
  void coefficients(const Acc* h, const Acc* dz, bool router, In* coef) const {
    each_slot(coefficient_bytes(router), [&](int64_t e, int64_t q) { coefficient(h, dz, router, coef, e, q); });
  }
};

}  // namespace MOA_ISA
}  // namespace moa
