// A third register tile beside those of micro.h, for processors with two 512-bit multiply-adds a cycle, and for AVX2:
//
//   panel_tile  out[m][:] = sum_k x_m[k] panel_k[:]     x broadcast, the panel contiguous along its columns
//
// It needs no sum across lanes and reads two lines less from L2 per step than a dot_tile, but whole vectors of columns,
// which routers of many experts and large ranks have (plan::panel_pays, strips_pay), and the weight, or A, turned over
// first. Sums go in runs of kPanelRun products, added in order: the same whatever tile an output falls into. The base's
// product of many tokens (linear.h) is made of the same tiles. Included only by kernels.h.
#pragma once

namespace moa {
namespace MOA_ISA {

// Columns [k0, k1) of M rows x against as many rows p of the panel, `ldp` apart, N vectors each, the last one with `last`
// columns. Only `rows` of the M are stored, or added to what is there.
template <class V, int M, int N, bool Tail>
static void panel_tile(const typename V::In* const* x, int rows, int64_t k0, int64_t k1, const typename V::In* p,
                       int64_t ldp, int last, bool add, typename V::Acc* out, int64_t ldo) {
  using In = typename V::In;
  typename V::AccVec acc[M][N];
  const In* xp[M];
  MOA_UNROLL
  for (int m = 0; m < M; ++m) xp[m] = x[m];
  MOA_UNROLL
  for (int m = 0; m < M; ++m) MOA_UNROLL
  for (int n = 0; n < N; ++n) acc[m][n] = V::zero();
  for (int m = 0; add && m < rows; ++m) prefetch_row(out + m * ldo, N * V::kAcc);
  MOA_UNROLL_4
  for (int64_t k = k0; k < k1; ++k, p += ldp) {
    typename V::InVec pv[N];
    MOA_UNROLL
    for (int n = 0; n < N; ++n) pv[n] = Tail && n == N - 1 ? V::load_n(p + n * V::kIn, last) : V::load(p + n * V::kIn);
    MOA_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::InVec xv = V::splat(xp[m] + k);
      MOA_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(xv, pv[n], acc[m][n]);
    }
  }
  MOA_UNROLL
  for (int m = 0; m < M; ++m) {
    if (m >= rows) break;
    MOA_UNROLL
    for (int n = 0; n < N; ++n) {
      typename V::Acc* o = out + m * ldo + n * V::kAcc;
      if (Tail && n == N - 1) {
        V::store_acc_n(o, add ? V::add(V::load_acc_n(o, last), acc[m][n]) : acc[m][n], last);
      } else {
        V::store_acc(o, add ? V::add(V::load_acc(o), acc[m][n]) : acc[m][n]);
      }
    }
  }
}

// Rows [0, rows) of x, at most kAxpyM, against `cols` columns, at most kAxpyN vectors of them: one tile, no higher than
// the rows need, in twos.
template <class V>
static inline void panel_rows(const typename V::In* const* x, int64_t rows, int64_t k0, int64_t k1,
                              const typename V::In* p, int64_t ldp, int64_t cols, bool add, typename V::Acc* out,
                              int64_t ldo) {
  constexpr int M = V::kAxpyM, N = V::kAxpyN;
  static_assert(M <= 6 && N <= 4, "the table below");
  using Tile = void (*)(const typename V::In* const*, int, int64_t, int64_t, const typename V::In*, int64_t, int, bool,
                        typename V::Acc*, int64_t);
  // Sizes past the instruction set's own tile repeat another: they are never asked for.
#define MOA_TILES(m, tail)                                                                             \
  {                                                                                                    \
    panel_tile<V, (m < M ? m : M), 1, tail>, panel_tile<V, (m < M ? m : M), 2, tail>,                  \
        panel_tile<V, (m < M ? m : M), (N > 3 ? 3 : N), tail>, panel_tile<V, (m < M ? m : M), N, tail> \
  }
  static constexpr Tile kTiles[2][3][4] = {{MOA_TILES(2, false), MOA_TILES(4, false), MOA_TILES(6, false)},
                                           {MOA_TILES(2, true), MOA_TILES(4, true), MOA_TILES(6, true)}};
#undef MOA_TILES
  const typename V::In* filled[M];
  for (int i = 0; i < M; ++i) filled[i] = x[i < rows ? i : rows - 1];
  const int64_t vectors = plan::ceil_div(cols, V::kIn);
  const int last = static_cast<int>(cols - (vectors - 1) * V::kIn);
  const Tile tile = kTiles[last < V::kIn][(rows - 1) / 2][vectors - 1];
  tile(filled, static_cast<int>(rows), k0, k1, p, ldp, last, add, out, ldo);
}

// A panel of one vector of columns, or a few of them one after the other: B as it lies, along its ranks, which no
// transposition turns over first. Sixteen rows meet it; each is in registers for eight steps, so that one load is left
// for a multiply-add. The sums are those of a panel_tile.
template <class V, int M, bool Tail>
static void narrow_tile(const typename V::In* const* x, int rows, int64_t k0, int64_t k1, const typename V::In* p,
                        int64_t ldp, int last, bool add, typename V::Acc* out, int64_t ldo) {
  using In = typename V::In;
  constexpr int K = 8,
                kSoon = 32;  // steps at once; how far ahead the panel's lines are asked for: 2 KB where ldp is 16
  auto load = [&](const In* at) { return Tail ? V::load_n(at, last) : V::load(at); };
  typename V::AccVec acc[M];
  MOA_UNROLL_16
  for (int m = 0; m < M; ++m) acc[m] = V::zero();
  int64_t k = k0;
  for (; k + K <= k1; k += K) {
    typename V::InVec pv[K];
    MOA_UNROLL
    for (int i = 0; i < K; ++i, p += ldp) {
      pv[i] = load(p);
      __builtin_prefetch(p + kSoon * ldp, 0, 2);
    }
    MOA_UNROLL_16
    for (int m = 0; m < M; ++m) {
      const In* row = x[m] + k;
      MOA_UNROLL
      for (int i = 0; i < K; ++i) acc[m] = V::fma(V::splat(row + i), pv[i], acc[m]);
    }
  }
  for (; k < k1; ++k, p += ldp) {
    const typename V::InVec pv = load(p);
    MOA_UNROLL_16
    for (int m = 0; m < M; ++m) acc[m] = V::fma(V::splat(x[m] + k), pv, acc[m]);
  }
  MOA_UNROLL_16
  for (int m = 0; m < M; ++m) {
    if (m >= rows) break;
    typename V::Acc* o = out + m * ldo;
    if constexpr (Tail) {
      V::store_acc_n(o, add ? V::add(V::load_acc_n(o, last), acc[m]) : acc[m], last);
    } else {
      V::store_acc(o, add ? V::add(V::load_acc(o), acc[m]) : acc[m]);
    }
  }
}

// Its tiles are no higher than the rows need, in twos, and of equal height as far as they can be.
template <class V>
static inline void narrow_block(const typename V::In* const* x, int64_t m_size, int64_t n_size, int64_t k0, int64_t k1,
                                const typename V::In* p, int64_t ldp, typename V::Acc* out, int64_t ldo) {
  using Tile = void (*)(const typename V::In* const*, int, int64_t, int64_t, const typename V::In*, int64_t, int, bool,
                        typename V::Acc*, int64_t);
#define MOA_TILES(tail)                                                                                        \
  {                                                                                                            \
    narrow_tile<V, 2, tail>, narrow_tile<V, 4, tail>, narrow_tile<V, 6, tail>, narrow_tile<V, 8, tail>,        \
        narrow_tile<V, 10, tail>, narrow_tile<V, 12, tail>, narrow_tile<V, 14, tail>, narrow_tile<V, 16, tail> \
  }
  static constexpr Tile kTiles[2][8] = {MOA_TILES(false), MOA_TILES(true)};
#undef MOA_TILES
  constexpr int64_t M = 16;
  const int64_t tiles = plan::ceil_div(m_size, M);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t m = m_size * i / tiles, rows = m_size * (i + 1) / tiles - m;
    const typename V::In* filled[M];
    for (int64_t j = 0; j < M; ++j) filled[j] = x[m + min64(j, rows - 1)];
    for (int64_t n = 0; n < n_size; n += V::kIn) {
      const int last = static_cast<int>(min64(V::kIn, n_size - n));
      kTiles[last < V::kIn][(rows - 1) / 2](filled, static_cast<int>(rows), k0, k1, p + n, ldp, last, k0 > 0,
                                            out + m * ldo + n, ldo);
    }
  }
}

// out[m][:] = sum_k rows_k[m] coef_k[:], M columns of the rows and one vector of coefficients, `ldc` apart, of which
// `last` are stored.
template <class V, int M, bool Tail>
static void outer_tile(const typename V::In* const* rows, int64_t at, int64_t k_size, const typename V::In* coef,
                       int64_t ldc, int last, typename V::Acc* out, int64_t ldo) {
  typename V::AccVec acc[M];
  MOA_UNROLL_16
  for (int m = 0; m < M; ++m) acc[m] = V::zero();
  for (int64_t k = 0; k < k_size; ++k, coef += ldc) {
    const typename V::InVec c = Tail ? V::load_n(coef, last) : V::load(coef);
    const typename V::In* row = rows[k] + at;
    MOA_UNROLL_16
    for (int m = 0; m < M; ++m) acc[m] = V::fma(V::splat(row + m), c, acc[m]);
  }
  MOA_UNROLL_16
  for (int m = 0; m < M; ++m) {
    if constexpr (Tail) {
      V::store_acc_n(out + m * ldo, acc[m], last);
    } else {
      V::store_acc(out + m * ldo, acc[m]);
    }
  }
}

// Rows of a panel, `ld` apart; of its columns every kStrip-th begins `step` times as far from the first.
template <class In>
struct PanelRun {
  const In* rows;
  int64_t ld, step = 1;
};

// out[m][n] = sum_k x_m[k] panel_k[n], in tiles; fewer rows are filled up. panel(k0, count): rows [k0, k0 + count).
template <class V, class Panel>
static void panel_block(const typename V::In* const* x, int64_t m_size, int64_t n_size, int64_t k_size,
                        typename V::Acc* out, int64_t ldo, const Panel& panel) {
  constexpr int64_t M = V::kAxpyM, kWide = kStrip<V>;
  for (int64_t k0 = 0; k0 < k_size; k0 += plan::kPanelRun) {
    const int64_t k1 = min64(k0 + plan::kPanelRun, k_size);
    const PanelRun<typename V::In> run = panel(k0, k1 - k0);
    if constexpr (!V::kStrips)
      if (plan::narrow_panel(n_size, V::kIn, processor())) {
        narrow_block<V>(x, m_size, n_size, k0, k1, run.rows, run.ld, out, ldo);
        continue;
      }
    for (int64_t m = 0; m < m_size; m += M)  // a tile of x stays in L1 while the panel streams from L2
      for (int64_t n = 0; n < n_size; n += kWide)
        panel_rows<V>(x + m, min64(M, m_size - m), k0, k1, run.rows + n * run.step, run.ld, min64(kWide, n_size - n),
                      k0 > 0, out + m * ldo + n, ldo);
  }
}

}  // namespace MOA_ISA
}  // namespace moa
