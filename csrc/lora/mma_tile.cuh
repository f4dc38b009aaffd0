// The tile of tile.cuh on tensor cores: T bfloat16 or float16, float32 sums. A Form (below) says its sizes.
//
//   x         Form::kRows rows, Form::kRowFrags fragments of 16 a warp
//   panel     8 kFrags rows, or columns, of 16-bit elements
//   router    8 kRouter rows of float32, whose products keep that accuracy
//
// All of it passes through shared memory in stages of kDepth k, copied while others are multiplied; 16-byte chunks of a
// row are exchanged by its number, so that neither copies nor fragments meet a bank twice. A panel by columns stays as
// it lies, [k][n], and is turned by ldmatrix_trans. The columns are shared out among kAcross warps: two of them have 64
// sums each instead of 128, and twice as many warps are there to wait (H200, T = 8192, in = 4096, 128 rows of A: 35 us
// instead of 44).
//
// Tensor cores cut sums off instead of rounding them: 4096 k in a chain are 4e-6 of h, 1024 are 1e-6 (H200). The
// router's products, and all where the form is not chained, are summed on them within a stage only, and then added to
// the total by ordinary additions: 1e-7.
//
// Router weights become terms of T beside what is being multiplied (router_terms.cuh): three products of one sum.
//
// What a thread needs of addresses in every stage is computed once and kept: left to itself the compiler does it again
// each time, in three times as many instructions as there are products.
#pragma once
#include "lora/router_terms.cuh"
#include "lora/tile.cuh"

namespace moa {

template <class T, class Form>
struct MmaTile {
  static constexpr int kRows = Form::kRows, kThreads = Form::kThreads, kDepth = Form::kDepth;
  static constexpr int kFrags = Form::kFrags, kRouter = Form::kRouter, kRowFrags = Form::kRowFrags;
  static constexpr int kStages = Form::kStages, kSteps = kDepth / 16;
  static constexpr int kChunks = kDepth / 8;                    // of a row
  static constexpr int kRowsEach = kRows * kChunks / kThreads;  // chunks of x per thread and stage
  static constexpr int kPanelEach = plan_cuda::ceil_div(8 * kFrags * kChunks, kThreads);
  static constexpr int kPanelAt = kRows * kDepth, kStage = (kRows + 8 * kFrags) * kDepth;  // elements
  using Router = RouterTerms<T, Form>;
  static constexpr int kTerms = Router::kTerms, kRaw = Router::kRaw;
  static_assert(kDepth == 32 || kDepth == 64, "ldmatrix_x4 takes 32 k of a panel's fragment");
  static_assert(kThreads % kChunks == 0, "a thread's chunk of a row is always the same");
  static_assert(kFrags / Form::kAcross % 2 == 0 && (kRouter <= 1 || kRouter / Form::kAcross % 2 == 0), "pairs");

  // What a warp has: rows of kRowFrags fragments, a share of the columns. A single fragment of the router's is shared out
  // by rows, the warp's first ones.
  static constexpr int kAcross = Form::kAcross, kMine = kFrags / kAcross;
  static constexpr bool kByRows = kRouter == 1 && kAcross > 1;
  static constexpr int kRouterRows = kByRows ? 1 : kRowFrags, kRouterMine = kByRows ? 1 : kRouter / kAcross;
  static_assert(!kByRows || kAcross == kRowFrags, "a fragment of rows each");

  float total[kRowFrags][kMine > 0 ? kMine : 1][4];  // as mma_m16n8k16 lays c out
  float routed[kRouterRows][kRouterMine > 0 ? kRouterMine : 1][4];

  // Of a lane, in a stage: where its part of x's fragments is, how far from it the next fragment's; of the panel's first
  // pair; and in the terms.
  unsigned x_at[kSteps], panel_at[kSteps], terms_at[kSteps / 2];
  int x_apart;

  __device__ __forceinline__ MmaTile() {
    const unsigned lane = threadIdx.x % kWarp, frag = kMine * warp_across() + lane / 16;  // of a pair, 16 k each
    x_apart = kRowFrags > 1 ? static_cast<int>((first_row(1) - first_row(0)) * kDepth) : 0;
    if (kByRows) keep(x_apart);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      x_at[step] = at(first_row(0) + lane % 16, 2 * step + lane / 16);
      panel_at[step] = kPanelAt + (Form::kColumns ? at_column(lane % 16 + 16 * step, frag)
                                                  : at(8 * frag + lane % 8, 2 * step + lane / 8 % 2));
      keep(x_at[step]);
      if (kFrags > 0) keep(panel_at[step]);
    }
#pragma unroll
    for (int half = 0; half < kSteps / 2; ++half) {
      terms_at[half] = at((kByRows ? 0 : 8 * kRouterMine * warp_across()) + lane % 8, 4 * half + lane / 8);
    }
  }
  static __device__ __forceinline__ unsigned warp_across() { return threadIdx.x / kWarp % kAcross; }
  static __device__ __forceinline__ unsigned first_row(unsigned frag) {
    return 16 * (kRowFrags * (threadIdx.x / kWarp / kAcross) + (kByRows ? frag ^ warp_across() : frag));
  }

  static __device__ __forceinline__ unsigned at(unsigned row, unsigned chunk) { return tile_at<kDepth>(row, chunk); }
  // In a panel by columns: rows of kFrags chunks, 8 of which (in one or several rows) cover the banks.
  static __device__ __forceinline__ unsigned at_column(unsigned k, unsigned frag) {
    constexpr unsigned kOf = kFrags > 0 ? kFrags : 1, kTogether = kOf >= 8 ? 1 : 8 / kOf;
    return (k * kOf + (frag ^ (k / kTogether & (kOf < 8 ? kOf - 1 : 7u)))) * 8;
  }
  // ---- copies ----

  static __device__ __forceinline__ unsigned row_at(unsigned i) {
    return threadIdx.x / kChunks + i * (kThreads / kChunks);
  }
  static __device__ __forceinline__ unsigned column_row(unsigned i) {
    constexpr unsigned kTogether = kFrags > 0 ? kFrags : 1;
    return threadIdx.x / kTogether + i * (kThreads / kTogether);
  }

  // What a thread copies of every stage, where all of it is whole 16-byte chunks. kAll: what the tile lacks may be
  // anything, and is a row again; else it is zero, and not read.
  template <bool kAll>
  struct Whole {
    using Row = std::conditional_t<kAll, uint32_t, const T*>;  // kAll: elements from x on
    const T *x, *panel;
    Row row[kRowsEach];
    uint32_t panel_row[kPanelEach > 0 ? kPanelEach : 1];  // elements from `panel` on
    bool row_there[kRowsEach], panel_there[kPanelEach > 0 ? kPanelEach : 1];
    unsigned to_x, to_panel;  // of the thread's first ones, in a stage
    int64_t panel_step;
    int left;  // k from here to the end

    template <class RowOf>
    __device__ __forceinline__ Whole(const Panel& p, int64_t k0, int64_t k1, const T* any, const RowOf& row_of)
        : x(any), panel(any), panel_step(Form::kColumns ? p.ld * kDepth : kDepth), left(static_cast<int>(k1 - k0)) {
      const int chunk = threadIdx.x % kChunks;
      const T* const first = row_of(row_at(0));
      if (kAll) x = first + k0 + 8 * chunk;
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        const T* const from = row_of(row_at(i));
        row_there[i] = from != nullptr;
        if constexpr (kAll) {
          row[i] = static_cast<uint32_t>(from - first);
          if (i > 0) keep(row[i]);
        } else {
          row[i] = row_there[i] ? from + k0 + 8 * chunk : any;
        }
      }
      to_x = at(row_at(0), chunk);
      to_panel = kPanelAt + (Form::kColumns ? at_column(column_row(0), threadIdx.x % (kFrags > 0 ? kFrags : 1)) : to_x);
      keep(to_x);
      if (kFrags > 0) keep(to_panel);
      const T* const base = static_cast<const T*>(p.base);
      if constexpr (Form::kColumns) {
        const int frag = threadIdx.x % kFrags;
        const PanelColumn at(p, kAll && 8 * frag >= p.rows ? (p.rows - 1) / 8 : frag);
        if (kAll || at.count > 0) panel = base + (k0 + column_row(0)) * p.ld + at.start;
#pragma unroll
        for (int i = 0; i < kPanelEach; ++i) {
          panel_there[i] = at.count > 0;
          panel_row[i] = kAll || at.count > 0 ? static_cast<uint32_t>((column_row(i) - column_row(0)) * p.ld) : 0;
        }
      } else if constexpr (kFrags > 0) {
        const auto there = [&](int i) {
          const int row = row_at(i);
          return kAll && row >= p.rows ? p.rows - 1 : row;
        };
        if (kAll || there(0) < p.rows) panel = base + there(0) * p.ld + k0 + 8 * chunk;
#pragma unroll
        for (int i = 0; i < kPanelEach; ++i) {
          panel_there[i] = there(i) < p.rows;
          panel_row[i] = kAll || panel_there[i] ? static_cast<uint32_t>((there(i) - there(0)) * p.ld) : 0;
        }
      }
    }
    __device__ __forceinline__ void operator()(T* to) {
      const int chunk = threadIdx.x % kChunks;
      const bool inside = 8 * chunk < left;
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        T* const there = to + to_x + i * (kThreads / kChunks) * kDepth;
        if constexpr (kAll) {
          cp_async_16(there, x + row[i], inside);
        } else {
          cp_async_16(there, row[i], row_there[i] && inside);
          row[i] += kDepth;
        }
      }
      if (kAll) x += kDepth;
#pragma unroll
      for (int i = 0; i < kPanelEach; ++i) {
        if (8 * kFrags * kChunks % kThreads != 0 && threadIdx.x + i * kThreads >= 8 * kFrags * kChunks) break;
        if constexpr (Form::kColumns) {
          cp_async_16(to + to_panel + i * (kThreads / kFrags) * kFrags * 8, panel + panel_row[i],
                      (kAll || panel_there[i]) && static_cast<int>(column_row(i)) < left);
        } else {
          cp_async_16(to + to_panel + i * (kThreads / kChunks) * kDepth, panel + panel_row[i],
                      (kAll || panel_there[i]) && inside);
        }
      }
      panel += panel_step;
      left -= kDepth;
    }
  };

  // In a panel by columns: where a fragment starts, and how many columns of it are there.
  struct PanelColumn {
    int64_t start;
    int count;
    __device__ __forceinline__ PanelColumn(const Panel& p, int frag) : start(8 * frag), count(p.rows - 8 * frag) {
      if (p.each == 0 || count <= 0) return;
      const int64_t of_expert = (p.each + 7) / 8, expert = (p.first + frag) / of_expert;
      const int64_t within = 8 * (p.first + frag - expert * of_expert);
      start = expert * p.apart + within;
      count = static_cast<int>(p.each - within);
    }
  };

  // The same for any addresses, panels of float32 and widths that are no whole chunks.
  template <class RowOf>
  struct Any {
    const Panel& p;
    int64_t k, k1;
    const T* any;
    bool x_direct;
    const RowOf& row_of;

    template <class S>
    __device__ __forceinline__ void panel(T* to) const {
      const S* const base = static_cast<const S*>(p.base);
#pragma unroll 1
      for (int i = threadIdx.x; i < 8 * kFrags * kChunks; i += kThreads) {
        if constexpr (Form::kColumns) {
          const int frag = i % kFrags, row = i / kFrags;
          const PanelColumn at(p, frag);
          const int64_t n = k + row < k1 ? at.count : 0;
          stage_chunk(to + at_column(row, frag), n > 0 ? base + (k + row) * p.ld + at.start : base, n, p.direct);
        } else {
          const int row = i / kChunks, chunk = i % kChunks;
          const int64_t n = row < p.rows ? k1 - (k + 8 * chunk) : 0;
          stage_chunk(to + at(row, chunk), n > 0 ? base + row * p.ld + k + 8 * chunk : base, n, p.direct);
        }
      }
    }
    __device__ __forceinline__ void operator()(T* to) {
#pragma unroll 1
      for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        const T* const from = row_of(row);
        const int64_t n = from == nullptr ? 0 : k1 - (k + 8 * chunk);
        stage_chunk(to + at(row, chunk), n > 0 ? from + k + 8 * chunk : any, n, x_direct);
      }
      if (p.f32) {
        panel<float>(to + kPanelAt);
      } else {
        panel<T>(to + kPanelAt);
      }
      k += kDepth;
    }
  };

  // ---- products ----

  // The products of a stage are a row of pairs of fragments, 16 k each. Where sums stay on the tensor cores, pairs of the
  // same k follow each other, else those of the same fragments.
  static constexpr int kPairs = kMine / 2, kUnits = kPairs * kSteps;
  static constexpr int step_of(int unit) { return Form::kChained ? unit / (kPairs > 0 ? kPairs : 1) : unit % kSteps; }
  static constexpr int frag_of(int unit) {
    return 2 * (Form::kChained ? unit % (kPairs > 0 ? kPairs : 1) : unit / kSteps);
  }
  __device__ __forceinline__ void load_pair(uint32_t (&b)[4], const T* from, int unit) const {
    const unsigned f = frag_of(unit), start = panel_at[step_of(unit)];
    if constexpr (Form::kColumns) {  // fragments are exchanged within eight, or within all there are
      ldmatrix_x4_trans(b, from + (start ^ 8 * (f % 8)) + 64 * (f / 8));
    } else {
      ldmatrix_x4(b, from + start + 8 * f * kDepth);
    }
  }
  __device__ __forceinline__ void add_panel(const uint32_t (&x)[kRowFrags][kSteps][4], const T* from) {
    uint32_t b[2][4];
    float part[kRowFrags][2][4] = {};
    load_pair(b[0], from, 0);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      if (unit + 1 < kUnits) load_pair(b[(unit + 1) % 2], from, unit + 1);
      const uint32_t (&now)[4] = b[unit % 2];
      const int f = frag_of(unit), step = step_of(unit);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int m = 0; m < kRowFrags; ++m)
          mma_m16n8k16<T>(Form::kChained ? total[m][f + j] : part[m][j], x[m][step], {now[2 * j], now[2 * j + 1]});
      if constexpr (!Form::kChained) {
        if (step < kSteps - 1) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int m = 0; m < kRowFrags; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              total[m][f + j][i] += part[m][j][i];
              part[m][j][i] = 0.0f;
            }
      }
    }
  }

  // Fragments first .. of the router's. A single one has a sum for each term: products in a row are independent.
  static constexpr int kTogether = kRouter > 1 ? 2 : 1;
  __device__ __forceinline__ void add_router(const uint32_t (&x)[kRowFrags][kSteps][4], const T* terms,
                                             const float* inverse, int first) {
    constexpr int kParts = kRouter > 1 ? 1 : 3;
    const int lane = threadIdx.x % kWarp, frag = kByRows ? 0 : kRouterMine * warp_across() + first;
    float part[kParts][kRouterRows][kTogether][4] = {};
#pragma unroll
    for (int half = 0; half < kSteps / 2; ++half)
#pragma unroll
      for (int term = 0; term < 3; ++term) {
        uint32_t b[kTogether][4];
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
          ldmatrix_x4(b[j], terms + terms_at[half] + 8 * (kRouter * term + first + j) * kDepth);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int j = 0; j < kTogether; ++j)
#pragma unroll
            for (int m = 0; m < kRouterRows; ++m)
              mma_m16n8k16<T>(part[term % kParts][m][j], x[m][2 * half + step], {b[j][2 * step], b[j][2 * step + 1]});
      }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      float2 unscale = make_float2(1.0f, 1.0f);
      if constexpr (std::is_same<T, __half>::value)
        unscale = *reinterpret_cast<const float2*>(inverse + 8 * (frag + j) + 2 * (lane % 4));
#pragma unroll
      for (int m = 0; m < kRouterRows; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float sum = part[kParts - 1][m][j][i];
#pragma unroll
          for (int more = kParts - 2; more >= 0; --more) sum += part[more][m][j][i];
          routed[m][first + j][i] += sum * (i % 2 == 0 ? unscale.x : unscale.y);
        }
    }
  }

  __device__ __forceinline__ void compute(const T* from, const T* terms, const float* inverse, int routers) {
    uint32_t x[kRowFrags][kSteps][4];
#pragma unroll
    for (int m = 0; m < kRowFrags; ++m)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) ldmatrix_x4(x[m][step], from + x_at[step] + m * x_apart);
#pragma unroll
    for (int q = 0; q < kRouterMine; q += 2) {
      if (kRouter > 2 && static_cast<int>(kRouterMine * warp_across()) + q >= routers) break;
      add_router(x, terms, inverse, q);
    }
    if constexpr (kFrags > 0) add_panel(x, from);
  }

  template <bool kWhole, class Stage>
  __device__ __forceinline__ void pipeline(const Panel& panel, int64_t k0, int64_t k1, T* shared, Stage stage) {
    const int steps = static_cast<int>((k1 - k0 + kDepth - 1) / kDepth), routers = (panel.router_rows + 7) / 8;
    T* const terms = shared + kStages * kStage;                       // [2][kTerms]
    float* const raw = reinterpret_cast<float*>(terms + 2 * kTerms);  // [kStages][kRaw]
    float* const inverse = raw + kStages * kRaw;                      // [2][8 kRouter]
    Router router(panel, k0, k1);
    // The router's copies are a stage ahead of the others.
    if constexpr (kRouter > 0) {
      router.template copy<kWhole>(raw);
      cp_async_commit();
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) stage(shared + s * kStage);
      if (kRouter > 0 && s + 1 < steps) router.template copy<kWhole>(raw + (s + 1) * kRaw);
      cp_async_commit();
    }
    if constexpr (kRouter > 0) {
      cp_async_wait<kStages - 1>();
      __syncthreads();  // everybody's copies for the first stage
      router.cut(raw, terms, inverse);
    }
    int slot = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there; everybody has left the one that is filled next
      if (step + kStages - 1 < steps) stage(shared + (slot == 0 ? kStages - 1 : slot - 1) * kStage);
      const int now = step % 2, next = slot == kStages - 1 ? 0 : slot + 1;
      if constexpr (kRouter > 0) {
        if (step + kStages < steps) router.template copy<kWhole>(raw + slot * kRaw);
        cp_async_commit();
        if (step + 1 < steps)
          router.cut(raw + next * kRaw, terms + (1 - now) * kTerms, inverse + (1 - now) * 8 * kRouter);
      } else {
        cp_async_commit();
      }
      compute(shared + slot * kStage, terms + now * kTerms, inverse + now * 8 * kRouter, routers);
      slot = next;
    }
    cp_async_wait<0>();
  }

  // row_of(m): pointer to row m of the tile, or null. any: an address of x, never read through. k0: of whole stages.
  // kAll: row_of gives some row for each m, so that rows' addresses are less than 2^32 elements apart; the panel has one
  // at least; and what comes of rows that are not there is not used.
  template <bool kAll, class RowOf>
  __device__ __forceinline__ void run(const Panel& panel, int64_t k0, int64_t k1, bool x_direct, T* shared,
                                      const T* any, const RowOf& row_of) {
    memset(total, 0, sizeof total);
    memset(routed, 0, sizeof routed);
    const bool direct = x_direct && (kFrags == 0 || panel.direct) && (kRouter == 0 || panel.router_direct);
    if (direct && k1 % 8 == 0) {
      pipeline<true>(panel, k0, k1, shared, Whole<kAll>(panel, k0, k1, any, row_of));
    } else {
      pipeline<false>(panel, k0, k1, shared, Any<RowOf>{panel, k0, k1, any, x_direct, row_of});
    }
  }

  // f(m, n, value, next) for pairs of neighbouring columns n, n + 1 of this thread, in a fragment of 16 rows, of which a
  // thread has two, `half` 0 and 1; router columns start at 8 kFrags.
  template <class F>
  __device__ __forceinline__ void each_pair(int frag, int half, const F& f) const {
    const int column = 2 * (threadIdx.x % 4), m = row(frag, half);
    if constexpr (kFrags > 0) {
#pragma unroll
      for (int i = 0; i < kMine; ++i)
        f(m, 8 * (kMine * warp_across() + i) + column, total[frag][i][2 * half], total[frag][i][2 * half + 1]);
    }
    if (frag >= kRouterRows) return;
#pragma unroll
    for (int i = 0; i < kRouterMine; ++i) {
      const int at = kByRows ? 0 : kRouterMine * warp_across() + i;
      f(m, 8 * (kFrags + at) + column, routed[frag][i][2 * half], routed[frag][i][2 * half + 1]);
    }
  }
  static __device__ __forceinline__ int row(int frag, int half) {
    return first_row(frag) + threadIdx.x % kWarp / 4 + 8 * half;
  }
};

}  // namespace moa
