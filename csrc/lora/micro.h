// The two register tiles under every kernel.
//
//   dot_tile    out[m][n]  = sum_k x_m[k] a_n[k]              both operands contiguous along k: shrink, router logits
//   axpy_tile   to_m[:]    = from_m[:] + sum_k coef[m][k] panel_k[:]   one operand broadcast: expand-combine, gram
//
// Each output is summed in the same order whatever tile it falls into, so neither blocking nor threads change a bit.
#pragma once
#include "common/convert.h"
#include "common/scratch.h"
#include "lora/plan.h"
#include "lora/repack.h"

namespace moa {
namespace MOA_ISA {

// Memory wanted soon, brought into L2 line by line between the arithmetic: rows are too short, and experts too far
// apart, for the hardware to foresee.
struct Ahead {
  const char* at;
  const char* end;
  int64_t pace = 256;  // bytes per step of a tile: one to four lines, in an axpy_tile one or two
  Ahead(const void* p, int64_t bytes) : at(static_cast<const char*>(p)), end(at + bytes) {}
  // Spreads what is wanted over so many steps of a tile that asks for `most` lines a step.
  void spread(int64_t steps, int64_t most) {
    const int64_t lines = (end - at) / 64 / (steps > 0 ? steps : 1) + 1;
    pace = 64 * (lines < most ? lines : most);
  }
};

}  // namespace MOA_ISA
}  // namespace moa

#if defined(MOA_HAS_AMX_BF16)
#include "lora/tiles.h"
#endif

namespace moa {
namespace MOA_ISA {

// ---- dot -------------------------------------------------------------------------------------------------------------
// Processors with AMX foresee the rows to come, multiply twice as fast as Zen 4 and have an L1 of 48 KiB: a tile asks
// for nothing, and where ten rows together exceed L1, goes over its columns in runs that stay there. T = 512, 2048
// inputs, E = 8, r = 16: 428 us in runs, 452 whole; 1024 inputs 207 and 187.
#if defined(MOA_HAS_AMX_BF16)
static constexpr bool kDotFetch = false, kDotRuns = true;
#else
static constexpr bool kDotFetch = true, kDotRuns = false;
#endif
static constexpr int64_t kDotRun = 512, kDotWhole = 1024;  // columns of a run; up to so many are one
// Columns of a step: a whole cache line, so that none is asked for twice.
template <class V>
static constexpr int64_t kDotStep = V::kIn * sizeof(typename V::In) < 64 ? 64 / sizeof(typename V::In) : V::kIn;

// Columns [begin, end) of all `size`; the lanes' sums between two runs.
template <class Acc>
struct DotColumns {
  int64_t begin, end, size;
  Acc* sums;
};

// x: M row pointers. a: N rows of what V loads, `lda` elements apart. out: out[m * ldo + n], when all columns are summed.
// soon_0, soon_1: two rows of x to come.
template <class V, int M, int N, class A>
static void dot_tile(const typename V::In* const* x, const typename V::In* soon_0, const typename V::In* soon_1,
                     const A* a, int64_t lda, const DotColumns<typename V::Acc>& columns, typename V::Acc* out,
                     int64_t ldo, Ahead* ahead) {
  using In = typename V::In;
  const int64_t begin = kDotRuns ? columns.begin : 0, end = columns.end;
  typename V::AccVec acc[M][N];
  const In* xp[M];
  const A* ap[N];
  MOA_UNROLL
  for (int m = 0; m < M; ++m) xp[m] = x[m];
  MOA_UNROLL
  for (int n = 0; n < N; ++n) ap[n] = a + n * lda;
  MOA_UNROLL
  for (int m = 0; m < M; ++m) MOA_UNROLL
  for (int n = 0; n < N; ++n) acc[m][n] = begin == 0 ? V::zero() : V::load_acc(columns.sums + (m * N + n) * V::kAcc);
  // `pace` new lines a step, as long as there are any: a line asked for again costs nothing but its slot.
  constexpr int64_t kStep = kDotStep<V>;
  const int64_t step = ahead->end - ahead->at >= ahead->pace * ((end - begin) / kStep) ? ahead->pace : 0;
  const char* soon = ahead->at;
  auto vectors = [&](int64_t k) {  // the fewer operands stay in registers, the others come one after the other
    constexpr bool kKeepX = M < N;
    constexpr int kKept = kKeepX ? M : N, kStreamed = kKeepX ? N : M;
    auto of_x = [&](int m) { return V::load(xp[m] + k); };
    auto of_a = [&](int n) { return V::load(ap[n] + k); };
    typename V::InVec kept[kKept];
    MOA_UNROLL
    for (int i = 0; i < kKept; ++i) kept[i] = kKeepX ? of_x(i) : of_a(i);
    MOA_UNROLL
    for (int j = 0; j < kStreamed; ++j) {
      const typename V::InVec streamed = kKeepX ? of_a(j) : of_x(j);
      MOA_UNROLL
      for (int i = 0; i < kKept; ++i) {
        typename V::AccVec& sum = kKeepX ? acc[i][j] : acc[j][i];
        sum = V::fma(streamed, kept[i], sum);
      }
    }
  };
  int64_t k = begin;
  for (; k + kStep <= end; k += kStep, soon += step) {
    if constexpr (kDotFetch) {
      MOA_UNROLL
      for (int n = 0; n < 4; ++n) __builtin_prefetch(soon + n * 64, 0, 2);
      __builtin_prefetch(soon_0 + k, 0, 2);
      __builtin_prefetch(soon_1 + k, 0, 2);
    }
    MOA_UNROLL
    for (int64_t i = 0; i < kStep; i += V::kIn) vectors(k + i);
  }
  for (; kStep > V::kIn && k + V::kIn <= end; k += V::kIn) vectors(k);
  ahead->at = soon;
  if (kDotRuns && end < columns.size) {
    MOA_UNROLL
    for (int m = 0; m < M; ++m) MOA_UNROLL
    for (int n = 0; n < N; ++n) V::store_acc(columns.sums + (m * N + n) * V::kAcc, acc[m][n]);
    return;
  }
  if (k < end) {
    const int rest = static_cast<int>(end - k);
    for (int n = 0; n < N; ++n) {
      const typename V::InVec av = V::load_n(ap[n] + k, rest);
      for (int m = 0; m < M; ++m) acc[m][n] = V::fma(V::load_n(xp[m] + k, rest), av, acc[m][n]);
    }
  }
  MOA_UNROLL
  for (int m = 0; m < M; ++m) {
    typename V::Acc sum[4];
    const typename V::AccVec none = V::zero();
    V::reduce4(acc[m][0], N > 1 ? acc[m][N > 1 ? 1 : 0] : none, N > 2 ? acc[m][N > 2 ? 2 : 0] : none,
               N > 3 ? acc[m][N > 3 ? 3 : 0] : none, sum);
    MOA_UNROLL
    for (int n = 0; n < N; ++n) out[m * ldo + n] = sum[n];
  }
}

// Any number of rows x against any number of rows a. `x_outer` keeps a tile of x in L1 while a streams from L2,
// otherwise a group of a's rows stays while x streams. x holds `m_ahead` more row pointers than m_size, for prefetching.
template <class V, class A>
static void dot_block(const typename V::In* const* x, int64_t m_size, int64_t m_ahead, const A* a, int64_t lda,
                      int64_t n_size, int64_t k_size, typename V::Acc* out, int64_t ldo, bool x_outer, Ahead ahead) {
#if defined(MOA_HAS_AMX_BF16)
  if constexpr (V::kTiles)
    if (m_size > plan::kTileFewRows) return dot_tiles(x, m_size, m_ahead, a, lda, n_size, k_size, out, ldo);
#endif
  using In = typename V::In;
  using Acc = typename V::Acc;
  using Columns = DotColumns<Acc>;
  using Tile =
      void (*)(const In* const*, const In*, const In*, const A*, int64_t, const Columns&, Acc*, int64_t, Ahead*);
  constexpr int M = V::kDotM, N = V::kDotN;
  static_assert(M <= 6 && N <= 4, "the table below");
  // Sizes past the instruction set's own tile repeat a smaller one: they are never asked for.
#define MOA_ROW(m)                                                                                             \
  {                                                                                                            \
    dot_tile<V, (m <= M ? m : 1), 1, A>, dot_tile<V, (m <= M ? m : 1), (2 <= N ? 2 : 1), A>,                   \
        dot_tile<V, (m <= M ? m : 1), (3 <= N ? 3 : 1), A>, dot_tile<V, (m <= M ? m : 1), (4 <= N ? 4 : 1), A> \
  }
  static constexpr Tile kTiles[6][4] = {MOA_ROW(1), MOA_ROW(2), MOA_ROW(3), MOA_ROW(4), MOA_ROW(5), MOA_ROW(6)};
#undef MOA_ROW
  const int64_t tiles = ((m_size + M - 1) / M) * ((n_size + N - 1) / N);
  ahead.spread(tiles * (k_size / kDotStep<V>), 4);
  // Tiles of equal height, as far as they can be: a low one at the end loads a for few products.
  auto height = [&](int64_t m, int64_t m_end) {
    const int64_t left = m_end - m, tiles = (left + M - 1) / M;
    return (left + tiles - 1) / tiles;
  };
  // The rows of the next tile of x are fetched two at a time, while the groups of a pass over this one.
  auto tile = [&](int64_t m, int64_t rows, int64_t n, const Columns& columns) {
    const int64_t cols = n_size - n < N ? n_size - n : N, pass = n / N;
    const int64_t soon = m + rows + 2 * pass;
    const bool more = kDotFetch && pass < M / 2 && soon + 1 < m_size + m_ahead;
    kTiles[rows - 1][cols - 1](x + m, more ? x[soon] : x[m], more ? x[soon + 1] : x[m], a + n * lda, lda, columns,
                               out + m * ldo + n, ldo, &ahead);
  };
  const Columns all{0, k_size, k_size, nullptr};
  if (kDotRuns && n_size > N && k_size > kDotWhole) {
    constexpr int64_t kRows = 4 * M;  // whose sums stay beside them
    const int64_t groups = (n_size + N - 1) / N;
    Acc* sums = scratch<Acc>(Scratch::tiles, 4 * groups * M * N * V::kAcc);
    for (int64_t m0 = 0; m0 < m_size; m0 += kRows) {
      const int64_t m1 = m0 + kRows < m_size ? m0 + kRows : m_size;
      for (int64_t k0 = 0; k0 < k_size; k0 += kDotRun) {
        Columns run{k0, k0 + kDotRun < k_size ? k0 + kDotRun : k_size, k_size, sums};
        for (int64_t m = m0, rows = 0; m < m1; m += rows) {
          rows = height(m, m1);
          for (int64_t n = 0; n < n_size; n += N, run.sums += M * N * V::kAcc) tile(m, rows, n, run);
        }
      }
    }
  } else if (x_outer) {
    for (int64_t m = 0, rows = 0; m < m_size; m += rows) {
      rows = height(m, m_size);
      for (int64_t n = 0; n < n_size; n += N) tile(m, rows, n, all);
    }
  } else {
    for (int64_t n = 0; n < n_size; n += N)
      for (int64_t m = 0, rows = 0; m < m_size; m += rows) {
        rows = height(m, m_size);
        tile(m, rows, n, all);
      }
  }
}

// ---- axpy ------------------------------------------------------------------------------------------------------------
// A panel's elements of a tile's columns. A panel in strips of so many, each with all its rows, meets no cache set twice.
template <class V>
static constexpr int64_t kStrip = V::kAxpyN * V::kIn;
// Whether its vectors have 512 bits.
template <class V>
static constexpr bool kWide = V::kIn * sizeof(typename V::In) == 64;
// How many rows a panel has, and how far apart its strips begin; kStrip where a row lies in one piece.
struct PanelRows {
  int64_t count, step;
};

// to_m[:] = from_m[:] + sum_k coef[m][k] panel_k[:], each N * kAcc wide from column col on (the last vector `last`
// lanes), which stands at panel_k + at. panel: k_size row pointers. coef: the pack of In for (m, k) stands at
// coef + m * cm + k * ck.
template <class V, int M, int N, bool Tail>
static void axpy_tile(const typename V::Acc* const* from, typename V::Acc* const* to, int64_t col, int64_t at,
                      const typename V::In* coef, int64_t cm, int64_t ck, const typename V::In* const* panel,
                      int64_t k_size, int last, Ahead* ahead) {
  typename V::AccVec acc[M][N];
  MOA_UNROLL
  for (int m = 0; m < M; ++m) {
    const typename V::Acc* c = from[m] + col;
    MOA_UNROLL
    for (int n = 0; n < N; ++n)
      acc[m][n] = Tail && n == N - 1 ? V::load_acc_n(c + n * V::kAcc, last) : V::load_acc(c + n * V::kAcc);
  }
  const int64_t step = ahead->end - ahead->at >= ahead->pace * k_size ? ahead->pace : 0;
  const char* soon = ahead->at;
  for (int64_t k = 0; k < k_size; ++k, soon += step) {
    const typename V::In* p = panel[k] + at;
    typename V::InVec pv[N];
    MOA_UNROLL
    for (int n = 0; n < N; ++n)
      pv[n] = Tail && n == N - 1 ? V::load_n(p + n * V::kIn, last * V::kPack) : V::load(p + n * V::kIn);
    MOA_UNROLL
    for (int n = 0; n < 2; ++n) __builtin_prefetch(soon + n * 64, 0, 2);
    const typename V::In* w = coef + k * ck;
    MOA_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::InVec wv = V::splat(w + m * cm);
      MOA_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(wv, pv[n], acc[m][n]);
    }
  }
  ahead->at = soon;
  MOA_UNROLL
  for (int m = 0; m < M; ++m) {
    typename V::Acc* c = to[m] + col;
    MOA_UNROLL
    for (int n = 0; n < N; ++n) {
      if (Tail && n == N - 1) {
        V::store_acc_n(c + n * V::kAcc, acc[m][n], last);
      } else {
        V::store_acc(c + n * V::kAcc, acc[m][n]);
      }
    }
  }
}

template <class V, int M>
static void axpy_rows(const typename V::Acc* const* from, typename V::Acc* const* to, const typename V::In* coef,
                      int64_t cm, int64_t ck, const typename V::In* const* panel, int64_t k_size, int64_t col,
                      int64_t width, int64_t step, Ahead* ahead) {
  constexpr int N = V::kAxpyN;
  int64_t at = col / (N * V::kAcc) * step;
  for (; col + N * V::kAcc <= width; col += N * V::kAcc, at += step)
    axpy_tile<V, M, N, false>(from, to, col, at, coef, cm, ck, panel, k_size, 0, ahead);
  for (; N > 2 && col + 2 * V::kAcc <= width; col += 2 * V::kAcc, at += 2 * V::kIn)
    axpy_tile<V, M, 2, false>(from, to, col, at, coef, cm, ck, panel, k_size, 0, ahead);
  for (; col < width; col += V::kAcc, at += V::kIn)
    axpy_tile<V, M, 1, true>(from, to, col, at, coef, cm, ck, panel, k_size,
                             static_cast<int>(width - col < V::kAcc ? width - col : V::kAcc), ahead);
}

// Columns [col, width) of m <= kAxpyM rows, k_size rows of the panel, whose strips begin `step` elements apart; col is
// where one begins. A row of `to` may be that of `from`.
template <class V>
static inline void axpy_block(int m, const typename V::Acc* const* from, typename V::Acc* const* to,
                              const typename V::In* coef, int64_t cm, int64_t ck, const typename V::In* const* panel,
                              int64_t k_size, int64_t width, Ahead* ahead, int64_t col = 0, int64_t step = kStrip<V>) {
#if defined(MOA_HAS_AMX_BF16)
  if constexpr (V::kTiles) {
    if (ck == V::kPack) col = axpy_tiles(m, from, to, coef, cm, panel, k_size, width);
    for (int i = 0; col < width && i < m; i += BF16::kAxpyM)
      axpy_block<BF16>(m - i < BF16::kAxpyM ? m - i : BF16::kAxpyM, from + i, to + i, coef + i * cm, cm, ck, panel,
                       k_size, width, ahead, col);
    return;
  }
#endif
  switch (m) {
    case 1: return axpy_rows<V, 1>(from, to, coef, cm, ck, panel, k_size, col, width, step, ahead);
    case 2: return axpy_rows<V, 2>(from, to, coef, cm, ck, panel, k_size, col, width, step, ahead);
    case 3: return axpy_rows<V, 3>(from, to, coef, cm, ck, panel, k_size, col, width, step, ahead);
    case 4:
      return axpy_rows<V, (V::kAxpyM > 3 ? 4 : 1)>(from, to, coef, cm, ck, panel, k_size, col, width, step, ahead);
    case 5:
      return axpy_rows<V, (V::kAxpyM > 4 ? 5 : 1)>(from, to, coef, cm, ck, panel, k_size, col, width, step, ahead);
    default:
      return axpy_rows<V, (V::kAxpyM > 5 ? 6 : 1)>(from, to, coef, cm, ck, panel, k_size, col, width, step, ahead);
  }
}

}  // namespace MOA_ISA
}  // namespace moa
