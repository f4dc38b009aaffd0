// The operands of an expert in the layouts the kernels want, converted where they are stored in another type.
// Included only by slots.h.
#pragma once

namespace moa {
namespace MOA_ISA {

// V: arithmetic; TA: storage of lora_A and lora_B.
template <class V, class TA>
struct Operands {
  using In = typename V::In;
  using Acc = typename V::Acc;
  static constexpr bool kDirect = Same<TA, In>::value;

  const LoraParams& p;
  const TA* A;
  const TA* B;

  explicit Operands(const LoraParams& params)
      : p(params), A(static_cast<const TA*>(params.lora_A)), B(static_cast<const TA*>(params.lora_B)) {}

  int64_t rank_of(int64_t e) const { return p.ranks == nullptr ? p.rank : p.ranks[e]; }

  // Rows [j0, j1) of A_e, along in.
  const In* a_rows(int64_t e, int64_t j0, int64_t j1) const {
    const TA* a = A + (e * p.rank + j0) * p.in;
    if constexpr (kDirect) {
      return a;
    } else {
      return row_as<V, TA>(a, (j1 - j0) * p.in, scratch<In>(Scratch::panel, (j1 - j0) * p.in));
    }
  }
  // Columns [j0, j1) of B_e as rows along out, b_ld() apart: an odd number of lines, so that what is written at once
  // does not share a cache set.
  int64_t b_ld() const { return round_up(p.out, 128 / sizeof(In)) + 64 / sizeof(In); }
  const In* b_columns(int64_t e, int64_t j0, int64_t j1) const {
    const TA* b = B + e * p.out * p.rank + j0;
    In* dst = scratch<In>(Scratch::panel, (j1 - j0) * b_ld());
    transpose_as<V>(b, p.rank, p.out, j1 - j0, dst, b_ld());
    return dst;
  }
  // Ranks [j0, j1) of A_e as rows along them, a run of a panel (panel.h): `count` from input k0 on. On AVX2 in strips.
  PanelRun<In> a_across(int64_t e, int64_t j0, int64_t j1, int64_t k0, int64_t count) const {
    const int64_t ld = round_up(j1 - j0, V::kIn), strip = V::kStrips ? kStrip<V> : ld;
    const TA* a = A + (e * p.rank + j0) * p.in + k0;
    In* dst = scratch<In>(Scratch::panel, round_up(ld, strip) * count);
    for (int64_t j = 0; j < j1 - j0; j += strip)
      transpose_as<V>(a + j * p.in, p.in, min64(strip, j1 - j0 - j), count, dst + j * count, strip);
    return {dst, strip, V::kStrips ? count : 1};
  }
  // The same of B_e, `count` from output o0 on, where it lies so already; but in strips it is copied.
  PanelRun<In> b_across(int64_t e, int64_t j0, int64_t j1, int64_t o0, int64_t count) const {
    const TA* b = B + (e * p.out + o0) * p.rank;
    if constexpr (V::kStrips) {
      In* dst = scratch<In>(Scratch::panel, round_up(j1 - j0, kStrip<V>) * count);
      for (int64_t j = j0; j < j1; j += kStrip<V>)
        for (int64_t o = 0; o < count; ++o)
          copy_part<kStrip<V>>(b + o * p.rank + j, min64(kStrip<V>, j1 - j), dst + (j - j0) * count + o * kStrip<V>);
      return {dst, kStrip<V>, count};
    } else {
      return {row_as<V, TA>(b, count * p.rank, kDirect ? nullptr : scratch<In>(Scratch::panel, count * p.rank)) + j0,
              p.rank};
    }
  }
  // Rows of packs over ranks for `cols` outputs of B_e: [rank / kPack][cols].
  PanelRows b_panel(int64_t e, int64_t c0, int64_t cols, const In** rows) const {
    [[maybe_unused]] const int64_t rank = rank_of(e), packs = plan::ceil_div(rank, V::kPack);
    const TA* b = B + (e * p.out + c0) * p.rank;
    if constexpr (V::kPack == 1) {  // on AVX2 in strips
      const int64_t strip = V::kStrips ? kStrip<V> : cols;
      In* dst = scratch<In>(Scratch::panel, rank * round_up(cols, strip));
      for (int64_t c = 0; c < cols; c += strip)
        transpose_as<V>(b + c * p.rank, p.rank, min64(strip, cols - c), rank, dst + c * rank, strip);
      for (int64_t k = 0; k < rank; ++k) rows[k] = dst + k * strip;
      return {rank, V::kStrips ? rank * strip : kStrip<V>};
    } else {
      const TA* src = b;
      int64_t lds = p.rank;
      if (rank % 2 != 0 || p.rank % 2 != 0) {  // pad to whole pairs
        lds = 2 * packs;
        TA* padded = scratch<TA>(Scratch::convert, cols * lds);
        for (int64_t i = 0; i < cols; ++i) {
          memcpy(padded + i * lds, b + i * p.rank, rank * sizeof(TA));
          if (rank % 2 != 0) padded[i * lds + rank] = TA{0};
        }
        src = padded;
      }
      In* dst = scratch<In>(Scratch::panel, packs * cols * V::kPack);
      transpose(reinterpret_cast<const uint32_t*>(src), lds / 2, cols, packs, reinterpret_cast<uint32_t*>(dst), cols);
      for (int64_t k = 0; k < packs; ++k) rows[k] = dst + k * cols * V::kPack;
      return {packs, kStrip<V>};
    }
  }
  // The same for `cols` inputs of A_e, and after it the router's row where it takes part.
  PanelRows a_panel(int64_t e, int64_t c0, int64_t cols, const In** rows, const Acc* router) const {
    const int64_t rank = rank_of(e), packs = plan::ceil_div(rank, V::kPack);
    const TA* a = A + e * p.rank * p.in + c0;
    const int64_t all = round_up(p.rank, V::kPack) / V::kPack;
    if (V::kStrips && plan::expand_strips(p.seg.offsets[e + 1] - p.seg.offsets[e], rank)) {
      const int64_t count = router != nullptr ? all + 1 : rank;
      In* dst = scratch<In>(Scratch::panel, count * round_up(cols, kStrip<V>));
      for (int64_t k = 0; k < count; ++k) {
        rows[k] = dst + k * kStrip<V>;
        for (int64_t c = 0; c < cols; c += kStrip<V>) {
          const int64_t n = min64(kStrip<V>, cols - c);
          In* to = dst + c * count + k * kStrip<V>;
          if (k < rank) {
            copy_part<kStrip<V>>(a + k * p.in + c, n, to);
          } else {
            copy_part<kStrip<V>>(router + e * p.in + c0 + c, n, to);
          }
        }
      }
      return {count, count * kStrip<V>};
    }
    In* buffer = scratch<In>(Scratch::panel, (all + 1) * cols * V::kPack);
    for (int64_t k = 0; k < packs; ++k) {
      In* dst = buffer + k * cols * V::kPack;
      if constexpr (V::kPack == 2) {
        const TA* first = a + 2 * k * p.in;
        interleave(first, 2 * k + 1 < rank ? first + p.in : nullptr, cols, dst);
        rows[k] = dst;
      } else {
        rows[k] = row_as<V, TA>(a + k * p.in, cols, dst);
      }
    }
    if (router == nullptr) return {packs, kStrip<V>};
    // The router's coefficient stands after all p.rank ones; the ranks between have zero coefficients, so any row does.
    if constexpr (V::kPack == 2) {
      In* narrow = scratch<In>(Scratch::convert, cols);
      convert_row(router + e * p.in + c0, narrow, cols);
      for (int64_t k = packs; k <= all; ++k) {  // rows of their own: tiles want them one distance apart
        rows[k] = buffer + k * cols * V::kPack;
        interleave(narrow, narrow, cols, buffer + k * cols * V::kPack);
      }
    } else {
      for (int64_t k = packs; k <= all; ++k) rows[k] = router + e * p.in + c0;
    }
    return {all + 1, kStrip<V>};
  }
};

}  // namespace MOA_ISA
}  // namespace moa
