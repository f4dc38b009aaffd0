// Shrink, expand-combine and gram on a CPU, over the tiles of micro.h. Equations and shapes: lora.h.
// Included only by csrc/isa/kernels.cpp, once per instruction set.
#pragma once
#include "common/parallel.h"
#include "common/scratch.h"
#include "lora/lora.h"
#include "lora/micro.h"

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
// The token of a position, order[p] / top_k, by a multiplication: exact for every slot below 2^31.
class TokenAt {
 public:
  explicit TokenAt(const Segments& s) : order_(s.order) {
    const uint64_t top_k = s.top_k > 0 ? static_cast<uint64_t>(s.top_k) : 1;
    inverse_ = ((uint64_t{1} << 63) + top_k - 1) / top_k;
  }
  int64_t operator()(int64_t p) const {
    return static_cast<int64_t>(static_cast<unsigned __int128>(order_[p]) * inverse_ >> 63);
  }

 private:
  const int32_t* order_;
  uint64_t inverse_;  // 2^63 / top_k, rounded up
};
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

// dst[i][j] = src[j][i] for `rows` x `cols` elements of storage type T, as the In elements of V.
template <class V, class T>
static inline void transpose_as(const T* src, int64_t lds, int64_t rows, int64_t cols, typename V::In* dst,
                                int64_t ldd) {
  if constexpr (Same<T, typename V::In>::value) {
    transpose(src, lds, rows, cols, dst, ldd);
  } else {
    typename V::In* wide = scratch<typename V::In>(Scratch::convert, rows * cols);
    for (int64_t j = 0; j < rows; ++j) convert_row(src + j * lds, wide + j * cols, cols);
    transpose(wide, cols, rows, cols, dst, ldd);
  }
}

// n elements, at most N, which as a rule they are: then without a call.
template <int64_t N, class T, class In>
static inline void copy_part(const T* from, int64_t n, In* to) {
  if constexpr (!Same<T, In>::value) {
    convert_row(from, to, n);
  } else if (n == N) {
    memcpy(to, from, N * sizeof(In));
  } else {
    memcpy(to, from, n * sizeof(In));
  }
}

// Sum of products of two rows of accumulators: sixteen sums, which the compiler takes abreast, then those in pairs.
template <class Acc>
static inline Acc dot_row(const Acc* a, const Acc* b, int64_t n) {
  Acc sums[16] = {};
  int64_t j = 0;
  for (; j + 16 <= n; j += 16)
    for (int i = 0; i < 16; ++i) sums[i] += a[j + i] * b[j + i];
  for (int i = 0; j < n; ++i, ++j) sums[i] += a[j] * b[j];
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  return sums[0];
}

// Brings n elements in for writing: of y, or of a base, which y overwrites as a rule.
template <class T>
static inline void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 1, 2);
}

}  // namespace MOA_ISA
}  // namespace moa

#include "lora/panel.h"
#if defined(MOA_HAS_AMX_BF16)
#include "lora/dense.h"
#include "lora/strips.h"
#endif

namespace moa {
namespace MOA_ISA {

// ---- expand-combine --------------------------------------------------------------------------------------------------
// y[t][:] = base[t] + bias + sum over the token's slots of coef[p][:] times the expert's panel.
// Experts with depth(e) = 0 take no part. panel(e, col, cols, rows) sets the pointers to the expert's rows of packs,
// each `cols` packs long, and returns what they are; fetch(e, col, cols) is the memory it will read, prefetched
// while the expert before is at work. coef: [slots, ldc] in sorted order, weight and scale folded in.
//
// A token's sum goes from its start (base, bias or zeros) through a tile of accumulators to y: its first expert reads
// the start, its last one writes y, so y is touched once and the tile only between two experts of one token.
template <class V, class T, class Depth, class Panel, class Fetch>
static void expand(const Segments& s, const typename V::In* coef, int64_t ldc, int64_t width, T* y, const T* base,
                   int64_t ldbase, const T* bias, const Depth& depth, const Panel& panel, const Fetch& fetch) {
  using Acc = typename V::Acc;
  using In = typename V::In;
  constexpr bool direct = Same<T, Acc>::value;  // y and base can be operands themselves
  const plan::Expand plan = plan::expand(s.tokens, s.top_k, s.experts, width, thread_count(), processor());
  const bool fetched = plan::expand_fetch(processor());
  const TokenAt token_at(s);
  const int64_t token_blocks = plan::ceil_div(s.tokens, plan.token_block);
  const int64_t col_blocks = plan::ceil_div(width, plan.col_block);
  const int64_t bytes = s.tokens * width * 4 + min64(s.slots(), s.experts) * ldc * width * 4;
#if defined(MOA_HAS_AMX_BF16)
  const bf16_t* dense = nullptr;  // all coefficients, where the product is dense
  int64_t packs = 0;
  if constexpr (V::kTiles) {
    for (int64_t e = 0; e < s.experts; ++e) packs += plan::ceil_div(depth(e), 2);
    const int64_t steps = plan::ceil_div(packs, 16);
    if (steps > 0 && plan::dense_expand(s.tokens, s.top_k, s.experts, steps))
      dense = dense_coefficients(s, coef, ldc, steps, depth);
  }
#endif

  parallel_tasks(token_blocks * col_blocks, plan::worth_threads(bytes), [&](int64_t task) {
    const int64_t t0 = task / col_blocks * plan.token_block, t1 = min64(t0 + plan.token_block, s.tokens);
    const int64_t c0 = task % col_blocks * plan.col_block, cols = min64(plan.col_block, width - c0);
#if defined(MOA_HAS_AMX_BF16)
    if constexpr (V::kTiles) {
      if (dense != nullptr &&
          dense_expand(s, dense, packs, ldc, width, y, base, ldbase, bias, t0, t1, c0, cols, depth, panel))
        return;
      if (cols % 64 == 0)
        return expand_strips(s, coef, ldc, width, y, base, ldbase, bias, t0, t1, c0, cols, depth, panel);
    }
#endif
    // Rows of their own, packed: y's rows are often a power of two apart, and then share few cache sets.
    Acc* tile = scratch<Acc>(Scratch::tile, (plan.token_block + 1) * plan.col_block);
    Acc* start = tile + plan.token_block * plan.col_block;
    if (bias != nullptr) {
      convert_row(bias + c0, start, cols);
    } else {
      memset(start, 0, cols * sizeof(Acc));
    }
    // Where the sum of token t starts.
    auto start_of = [&](int64_t t) -> const Acc* {
      if (base == nullptr) return start;
      if constexpr (direct)
        if (bias == nullptr) return base + t * ldbase + c0;
      Acc* row = tile + (t - t0) * cols;
      memcpy(row, start, cols * sizeof(Acc));
      add_row(base + t * ldbase + c0, row, cols);
      return row;
    };

    auto segment = [&](int64_t e, int64_t* p0, int64_t* p1) {  // the expert's slots among this block's tokens
      *p0 = s.offsets[e];
      *p1 = depth(e) > 0 ? s.offsets[e + 1] : *p0;
      if (token_blocks == 1 || *p0 == *p1) return;
      *p0 = first_slot(s.order, *p0, *p1, t0 * s.top_k);
      *p1 = first_slot(s.order, *p0, *p1, t1 * s.top_k);
    };
    // Slots that each token still has to come, and whether one has been.
    int32_t* left = scratch<int32_t>(Scratch::counts, 2 * (t1 - t0));
    int32_t* begun = left + (t1 - t0);
    memset(left, 0, 2 * (t1 - t0) * sizeof(int32_t));
    int64_t e = 0, p0 = 0, p1 = 0;
    for (; e < s.experts; ++e) {
      segment(e, &p0, &p1);
      for (int64_t p = p0; p < p1; ++p) ++left[token_at(p) - t0];
    }
    for (int64_t t = t0; t < t1; ++t)
      if (left[t - t0] == 0) convert_row(start_of(t), y + t * width + c0, cols);

    p0 = p1 = e = 0;
    for (; e < s.experts && p0 == p1; ++e) segment(e, &p0, &p1);
    const int64_t first = e - 1;
    while (p0 < p1) {
      const int64_t expert = e - 1;
      int64_t next0 = 0, next1 = 0;
      for (; e < s.experts && next0 == next1; ++e) segment(e, &next0, &next1);
      const In** b = scratch<const In*>(Scratch::pointers, ldc);
      const PanelRows rows = panel(expert, c0, cols, b);
      // The next expert of this task, else the first of the next task, which is this thread's as a rule.
      const bool wrap = next0 == next1;
      Ahead ahead = wrap && c0 + cols >= width ? Ahead(coef, 0)
                                               : fetch(wrap ? first : e - 1, wrap ? c0 + cols : c0,
                                                       wrap ? min64(plan.col_block, width - c0 - cols) : cols);
      ahead.spread(axpy_tiles_of<V>(p1 - p0, cols), rows.count, 2);
      for (int64_t p = p0; p < p1;) {
        const Acc* from[V::kAxpyM];
        Acc* to[V::kAxpyM];
        T* ready[V::kAxpyM];  // rows of y that this group completes, and where they come from
        const Acc* summed[V::kAxpyM];
        int m = 0, done = 0;
        int64_t last = -1;
        for (; m < V::kAxpyM && p + m < p1; ++m) {
          const int64_t t = token_at(p + m), i = t - t0;
          if (t == last) break;  // one token twice under one expert: the second adds after the first is stored
          last = t;
          Acc* row = tile + i * cols;
          T* out = y + t * width + c0;
          from[m] = begun[i] ? row : start_of(t);
          to[m] = row;
          if (--left[i] == 0) {
            if constexpr (direct) {
              to[m] = out;
            } else {
              summed[done] = row;
              ready[done++] = out;
            }
          } else if (fetched && begun[i] == 0) {
            prefetch_row(out, cols);  // y's lines come in for writing meanwhile
          }
          begun[i] = 1;
          // A base comes from where the product left it: the rows of the next group are on their way meanwhile.
          if (base != nullptr && p + V::kAxpyM + m < p1) {
            const int64_t next = token_at(p + V::kAxpyM + m);
            if (begun[next - t0] == 0) prefetch_row(base + next * ldbase + c0, cols);
          }
        }
        axpy_block<V>(m, from, to, coef + p * ldc, ldc, V::kPack, b, rows.count, cols, &ahead, 0, rows.step);
        for (int i = 0; i < done; ++i) convert_row(summed[i], ready[i], cols);
        p += m;
      }
      p0 = next0;
      p1 = next1;
    }
  });
}

// ---- gram ------------------------------------------------------------------------------------------------------------
// G_e[j][:] = sum over the expert's slots of coef[p][j] * row(p)[:], j < depth(e), for the columns of one task.
// row(e, j, col) is where a row of the result goes, or null: then it goes to the tile, [depth] x cols of Acc, which
// store(e, col, cols, tile) takes, into the memory that fetch(e, col, cols) names. clear(e) writes the zeros of an expert
// without slots, all columns in one piece: with few tokens and many experts they are nearly all that is written.
// few(e, col, cols) may do an expert of few slots its own way, and says whether it has.
template <class V, class T, class Depth, class Row, class Store, class Fetch, class Clear, class Few>
static void gram(const Segments& s, const typename V::In* coef, int64_t ldc, const T* x, int64_t ldx, int64_t width,
                 const Depth& depth, const Row& row, const Store& store, const Fetch& fetch, const Clear& clear,
                 const Few& few) {
  using Acc = typename V::Acc;
  using In = typename V::In;
  const TokenAt token_at(s);
  const bool strips = V::kStrips && plan::gram_strips(ldc);
  int64_t most = 0;
  for (int64_t e = 0; e < s.experts; ++e)
    if (s.offsets[e + 1] - s.offsets[e] > most) most = s.offsets[e + 1] - s.offsets[e];
  const plan::Gram plan = strips ? plan::Gram{plan::gram_strip_cols(width, kStrip<V>), 1}
                                 : plan::gram(s.slots(), most, s.experts, ldc, width);
  const int64_t block = plan.cols;
  const int64_t col_blocks = plan::ceil_div(width, block);
  const int64_t clearing = min64(s.experts, plan::kGramClearTasks);
  const int64_t bytes = (s.slots() + s.experts * ldc) * width * 4;  // the zeros of empty experts are written too
  parallel_tasks(clearing + plan.ranges * col_blocks, plan::worth_threads(bytes), [&](int64_t task) {
    if (task < clearing) {
      const int64_t end = s.experts * (task + 1) / clearing;
      for (int64_t e = s.experts * task / clearing; e < end; ++e)
        if (s.offsets[e] == s.offsets[e + 1]) clear(e);
      return;
    }
    const int64_t range = (task - clearing) / col_blocks;
    const int64_t c0 = (task - clearing) % col_blocks * block, cols = min64(block, width - c0);
    // A range begins after the expert that holds the last slot before its share.
    auto begin = [&](int64_t i) { return i == 0 ? 0 : expert_at(s, s.slots() * i / plan.ranges - 1) + 1; };
    const int64_t e0 = begin(range), e1 = begin(range + 1);
    Acc* tile = scratch<Acc>(Scratch::tile, (2 * ldc + 1) * block);
    Acc* run_tile = tile + ldc * block;
    Acc* zeros = run_tile + ldc * block;
    memset(zeros, 0, cols * sizeof(Acc));
    auto total = [&](int64_t e, int64_t j) {
      Acc* out = row(e, j, c0);
      return out != nullptr ? out : tile + j * cols;
    };
    for (int64_t e = e0; e < e1; ++e) {
      const int64_t p0 = s.offsets[e], p1 = s.offsets[e + 1], rank = depth(e);
      if (p0 == p1 || few(e, c0, cols)) continue;
      for (int64_t p = p0; rank > 0 && p < p1; p += plan::kGramRun) {
        const int64_t run = min64(plan::kGramRun, p1 - p);
        const int64_t steps = plan::ceil_div(run, V::kPack);
        // Rows of the panel: slots, or pairs of slots interleaved; coefficients to match.
        const In** rows = scratch<const In*>(Scratch::pointers, steps);
        const In* w = coef + p * ldc;
        int64_t cm = 1, ck = ldc, cj = 1;  // from rank to rank of a tile, from step to step, from tile to tile per rank
        const int64_t apart = run + 4;     // rows from strip to strip, which would share cache sets otherwise
        const int64_t step = strips ? apart * kStrip<V> : kStrip<V>;
        if (strips) {  // x in strips of columns, coefficients in strips of ranks
          In* buffer = scratch<In>(Scratch::rows, apart * round_up(cols, kStrip<V>));
          In* turned = scratch<In>(Scratch::convert, apart * round_up(ldc, V::kAxpyM));
          for (int64_t i = 0; i < run; ++i) {
            const T* from = x + token_at(p + i) * ldx + c0;
            rows[i] = buffer + i * kStrip<V>;
            if (p + i + 8 < p1) prefetch_row(x + token_at(p + i + 8) * ldx + c0, cols);
            for (int64_t c = 0; c < cols; c += kStrip<V>)
              copy_part<kStrip<V>>(from + c, min64(kStrip<V>, cols - c), buffer + c * apart + i * kStrip<V>);
            for (int64_t j = 0; j < rank; j += V::kAxpyM)
              copy_part<V::kAxpyM>(w + i * ldc + j, min64(V::kAxpyM, rank - j), turned + j * apart + i * V::kAxpyM);
          }
          w = turned;
          ck = V::kAxpyM;
          cj = apart;
        } else if constexpr (V::kPack == 1) {
          const bool copied = !Same<T, In>::value || plan::gram_copied(rank, ldx * static_cast<int64_t>(sizeof(T)));
          In* buffer = copied ? scratch<In>(Scratch::rows, run * cols) : nullptr;
          for (int64_t i = 0; i < run; ++i) {
            const T* from = x + token_at(p + i) * ldx + c0;
            if (copied) {
              convert_row(from, buffer + i * cols, cols);
              rows[i] = buffer + i * cols;
            } else if constexpr (Same<T, In>::value) {
              rows[i] = from;
            }
          }
        } else {
          In* buffer = scratch<In>(Scratch::rows, steps * cols * 2);
          In* pairs = scratch<In>(Scratch::convert, steps * ldc * 2);
          for (int64_t i = 0; i < steps; ++i) {
            const int64_t a = p + 2 * i, b = a + 1;
            const T* xa = x + token_at(a) * ldx + c0;
            const T* xb = b < p + run ? x + token_at(b) * ldx + c0 : nullptr;
            interleave(xa, xb, cols, buffer + i * cols * 2);
            interleave(coef + a * ldc, xb != nullptr ? coef + b * ldc : nullptr, ldc, pairs + i * ldc * 2);
            rows[i] = buffer + i * cols * 2;
          }
          w = pairs;
          cm = cj = 2;
          ck = 2 * ldc;
          if constexpr (V::kTiles) {  // they want the pairs of a rank side by side
            In* turned = scratch<In>(Scratch::tiles, steps * ldc * 2);
            transpose(reinterpret_cast<const uint32_t*>(pairs), ldc, steps, ldc, reinterpret_cast<uint32_t*>(turned),
                      steps);
            w = turned;
            cm = cj = 2 * steps;
            ck = 2;
          }
        }
        Ahead ahead = p + run < p1 ? Ahead(x, 0) : fetch(e, c0, cols);
        ahead.spread(axpy_tiles_of<V>(rank, cols), steps, 2);
        const int64_t block = V::kStrips ? plan::kGramBlock : steps;  // sums go on from block to block
        const int64_t wide = strips ? kStrip<V> : cols;  // columns that all ranks meet before the next ones
        for (int64_t s0 = 0; s0 < steps; s0 += block)
          for (int64_t c = 0; c < cols; c += wide)
            for (int64_t j = 0; j < rank; j += V::kAxpyM) {
              const Acc* from[V::kAxpyM];
              Acc* to[V::kAxpyM];
              const int m = static_cast<int>(min64(V::kAxpyM, rank - j));
              for (int i = 0; i < m; ++i) {
                to[i] = p == p0 ? total(e, j + i) : run_tile + (j + i) * cols;
                from[i] = s0 == 0 ? zeros : to[i];
              }
              axpy_block<V>(m, from, to, w + j * cj + s0 * ck, cm, ck, rows + s0, min64(block, steps - s0),
                            min64(c + wide, cols), &ahead, c, step);
            }
        if (p != p0)
          for (int64_t j = 0; j < rank; ++j) add_row(run_tile + j * cols, total(e, j), cols);
      }
      store(e, c0, cols, tile);
    }
  });
}

}  // namespace MOA_ISA
}  // namespace moa
