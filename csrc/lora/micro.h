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
// apart, for the hardware to foresee. In one piece, or as rows `stride` bytes apart, of which `at` and `end` are the
// first: each step of a tile then asks for a part of one row.
struct Ahead {
  const char* at;
  const char* end;
  int64_t pace = 256;  // bytes per step of a tile: one to four lines, in an axpy_tile one or two
  int64_t stride = 0, lines = 0, tiles = 1, due = 0;  // of rows: a row's lines, the tiles that share them
  Ahead(const void* p, int64_t bytes, int64_t row_stride = 0)
      : at(static_cast<const char*>(p)), end(at + bytes), stride(row_stride), lines(bytes / 64) {}
  // Spreads what is wanted over so many tiles of so many steps, which ask for `most` lines a step.
  void spread(int64_t over, int64_t steps, int64_t most) {
    tiles = over > 0 ? over : 1;
    const int64_t a_step = (end - at) / 64 / (over * steps > 0 ? over * steps : 1) + 1;
    pace = 64 * (a_step < most ? a_step : most);
  }
  // What the steps of the next axpy_tile ask for: two lines, `second` bytes apart, from `from` on, `step` bytes further
  // each.
  struct Steps {
    const char* from;
    int64_t step, second;
  };
  Steps next(int64_t steps) {
    const char* from = at;
    if (stride == 0) {
      if (end - at < pace * steps) return {from, 0, 0};
      at += pace * steps;
      return {from, pace, 64};
    }
    int64_t count = 0;
    for (due += lines; due >= tiles && count < 2 && at + 64 <= end; ++count, at += 64) due -= tiles;
    return {from, count > 0 ? stride : 0, count > 1 ? 64 : 0};
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
// Processors with AMX foresee the rows to come where few meet, multiply twice as fast as Zen 4 and have an L1 of 48 KiB:
// a tile asks for what comes next only where an expert has several, and where ten rows together exceed L1, goes over its
// columns in runs that stay there. T = 512, 2048 inputs, E = 8, r = 16: 428 us in runs, 452 whole; 1024 inputs 207 and
// 187. Asking: 1024 inputs, E = 64 286 and 240 us, T = 2048, E = 256 1,580 and 1,420; but T = 16, 2048 inputs, E = 8 28 and
// 35.
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
// soon_0, soon_1: two rows of x to come. Fetch: whether it asks for them, and for what `ahead` names.
template <class V, int M, int N, class A, bool Fetch>
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
    if constexpr (Fetch) {
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
#define MOA_TILE(m, n, fetch) dot_tile<V, (m <= M ? m : 1), (n <= N ? n : 1), A, fetch>
#define MOA_ROW(m, fetch) {MOA_TILE(m, 1, fetch), MOA_TILE(m, 2, fetch), MOA_TILE(m, 3, fetch), MOA_TILE(m, 4, fetch)}
#define MOA_ROWS(fetch)                                                                                              \
  {                                                                                                                  \
    MOA_ROW(1, fetch), MOA_ROW(2, fetch), MOA_ROW(3, fetch), MOA_ROW(4, fetch), MOA_ROW(5, fetch), MOA_ROW(6, fetch) \
  }
  static constexpr Tile kTiles[2][6][4] = {MOA_ROWS(kDotFetch), MOA_ROWS(true)};
#undef MOA_ROWS
#undef MOA_ROW
#undef MOA_TILE
  const int64_t tiles = ((m_size + M - 1) / M) * ((n_size + N - 1) / N);
  ahead.spread(tiles, k_size / kDotStep<V>, 4);
  const bool fetch = kDotFetch || (m_size > M && ahead.end > ahead.at);
  // Tiles of equal height, as far as they can be: a low one at the end loads a for few products.
  auto height = [&](int64_t m, int64_t m_end) {
    const int64_t left = m_end - m, tiles = (left + M - 1) / M;
    return (left + tiles - 1) / tiles;
  };
  // The rows of the next tile of x are fetched two at a time, while the groups of a pass over this one.
  auto tile = [&](int64_t m, int64_t rows, int64_t n, const Columns& columns) {
    const int64_t cols = n_size - n < N ? n_size - n : N, pass = n / N;
    const int64_t soon = m + rows + 2 * pass;
    const bool more = fetch && pass < M / 2 && soon + 1 < m_size + m_ahead;
    kTiles[fetch][rows - 1][cols - 1](x + m, more ? x[soon] : x[m], more ? x[soon + 1] : x[m], a + n * lda, lda,
                                      columns, out + m * ldo + n, ldo, &ahead);
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
//
// The rows of y, or of a gradient, that a tile will write are asked for while it multiplies. Two Xeon cores with AMX, us
// without and with: 1024 x 1024, T = 512, E = 64 dx 440 and 370, dA 320 and 270; T = 2048, E = 256 expand 2,640 and 2,170,
// dx 3,440 and 3,010; 2048 x 2048, T = 512, E = 8 dx 600 and 500. Other processors: not measured.
#if defined(MOA_HAS_AMX_BF16)
static constexpr bool kAxpyFetch = true;
#else
static constexpr bool kAxpyFetch = false;
#endif
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
  if constexpr (kAxpyFetch) {
    MOA_UNROLL
    for (int m = 0; m < M; ++m) MOA_UNROLL
    for (int n = 0; n < N; ++n) __builtin_prefetch(to[m] + col + n * V::kAcc, 1, 3);
  }
  const Ahead::Steps soon = ahead->next(k_size);
  const char* line = soon.from;
  for (int64_t k = 0; k < k_size; ++k, line += soon.step) {
    const typename V::In* p = panel[k] + at;
    typename V::InVec pv[N];
    MOA_UNROLL
    for (int n = 0; n < N; ++n)
      pv[n] = Tail && n == N - 1 ? V::load_n(p + n * V::kIn, last * V::kPack) : V::load(p + n * V::kIn);
    __builtin_prefetch(line, 0, 2);
    __builtin_prefetch(line + soon.second, 0, 2);
    const typename V::In* w = coef + k * ck;
    MOA_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::InVec wv = V::splat(w + m * cm);
      MOA_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(wv, pv[n], acc[m][n]);
    }
  }
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

// So many tiles has a block of `rows` rows and `cols` columns.
template <class V>
static inline int64_t axpy_tiles_of(int64_t rows, int64_t cols) {
  return plan::ceil_div(rows, V::kAxpyM) * plan::ceil_div(cols, V::kAxpyN * V::kAcc);
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
