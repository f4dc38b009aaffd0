// The tile of tile.cuh on tensor cores: T bfloat16 or float16, float32 sums. A Form (below) says its sizes.
//
//   x         Form::kRows rows, Form::kRowFrags fragments of 16 a warp
//   panel     8 kFrags rows, or columns, of 16-bit elements
//   router    8 kRouter rows of float32, whose products keep that accuracy
//
// All of it passes through shared memory in stages of kDepth k, copied while others are multiplied; 16-byte chunks of a
// row are exchanged by its number, so that neither copies nor fragments meet a bank twice. A panel by columns stays as
// it lies, [k][n], and is turned by ldmatrix_trans. A warp has all columns of its rows: x's fragments are read once, and
// each fragment of the panel serves kRowFrags products.
//
// Products of one stage are summed on the tensor cores and then added to the total by ordinary additions: tensor cores
// cut sums off instead of rounding them. At 4096 k that is 1e-7 of h instead of 4e-6, and costs 3 % of the time (H200).
//
// Router weights are cut into terms, w = hi + mid + lo, three T terms of one accumulator, by the thread that has copied
// them: the next stage's, beside what is being multiplied. Three bfloat16 hold 24
// bits, so the products x hi, x mid, x lo are exact and sum to x w. float16 has the bits but not the range: the kDepth
// elements of a row are scaled by a power of two that brings the largest to 2^14 .. 2^15, undone as the stage is added.
// A tile of FFMAs would take E times longer than x's bytes from E = 16 on. x of inf gives NaN (inf times a term of 0).
#pragma once
#include "lora/tile.cuh"

namespace moa {

template <class T, class Form>
struct MmaTile {
  static constexpr int kRows = Form::kRows, kThreads = Form::kThreads, kDepth = Form::kDepth;
  static constexpr int kFrags = Form::kFrags, kRouter = Form::kRouter, kRowFrags = Form::kRowFrags;
  static constexpr int kStages = Form::kStages, kSteps = kDepth / 16;
  static constexpr int kChunks = kDepth / 8;                      // of a row
  static constexpr int kRowsEach = kRows * kChunks / kThreads;    // chunks of x per thread and stage
  static constexpr int kPanelEach = plan_cuda::ceil_div(8 * kFrags * kChunks, kThreads);
  static constexpr int kRouterEach = plan_cuda::ceil_div(8 * kRouter * kChunks, kThreads);
  static constexpr int kPanelAt = kRows * kDepth, kStage = (kRows + 8 * kFrags) * kDepth;  // elements
  static constexpr int kTerms = 24 * kRouter * kDepth, kRaw = 8 * kRouter * kDepth;        // of a stage
  static_assert(kDepth == 32 || kDepth == 64, "ldmatrix_x4 takes 32 k of a panel's fragment");
  static_assert(kThreads % (2 * kChunks) == 0 && kFrags % 2 == 0, "a thread's chunk of a row is always the same");

  float total[kRowFrags][kFrags + kRouter][4];  // as mma_m16n8k16 lays c out; fragments, then the router's

  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kDepth + ((chunk ^ (kDepth == 64 ? row & 7 : row / 2 & 3)) * 8);
  }
  // In a panel by columns: rows of kFrags chunks, 8 of which (in one or several rows) cover the banks.
  static __device__ __forceinline__ int at_column(int k, int frag) {
    constexpr int kTogether = kFrags >= 8 ? 1 : 8 / (kFrags > 0 ? kFrags : 1);
    return (k * kFrags + (frag ^ (k / kTogether & (kFrags < 8 ? kFrags - 1 : 7)))) * 8;
  }
  // ---- copies ----

  // What a thread copies of every stage, where all of it is whole 16-byte chunks.
  struct Whole {
    const T *rows[kRowsEach], *panel[kPanelEach > 0 ? kPanelEach : 1];
    bool row_there[kRowsEach], panel_there[kPanelEach > 0 ? kPanelEach : 1];
    int64_t panel_step;
    int left;  // k from here to the end

    template <class RowOf>
    __device__ __forceinline__ Whole(const Panel& p, int64_t k0, int64_t k1, const T* any, const RowOf& row_of)
        : panel_step(Form::kColumns ? p.ld * kDepth : kDepth), left(static_cast<int>(k1 - k0)) {
      const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        const T* const row = row_of(first + i * (kThreads / kChunks));
        row_there[i] = row != nullptr;
        rows[i] = row_there[i] ? row + k0 + 8 * chunk : any;
      }
      const T* const base = static_cast<const T*>(p.base);
#pragma unroll
      for (int i = 0; i < kPanelEach; ++i) {
        if constexpr (Form::kColumns) {
          const PanelColumn at(p, threadIdx.x % kFrags);
          panel_there[i] = at.count > 0;
          panel[i] = panel_there[i] ? base + (k0 + column_row(i)) * p.ld + at.start : any;
        } else {
          const int row = first + i * (kThreads / kChunks);
          panel_there[i] = row < p.rows;
          panel[i] = panel_there[i] ? base + row * p.ld + k0 + 8 * chunk : any;
        }
      }
    }
    __device__ __forceinline__ void operator()(T* to) {
      const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
      const bool inside = 8 * chunk < left;
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        cp_async_16(to + at(first + i * (kThreads / kChunks), chunk), rows[i], row_there[i] && inside);
        rows[i] += kDepth;
      }
#pragma unroll
      for (int i = 0; i < kPanelEach; ++i) {
        if (8 * kFrags * kChunks % kThreads != 0 && threadIdx.x + i * kThreads >= 8 * kFrags * kChunks) break;
        T* const there = to + kPanelAt;
        if constexpr (Form::kColumns) {
          cp_async_16(there + at_column(column_row(i), threadIdx.x % kFrags), panel[i],
                      panel_there[i] && column_row(i) < left);
        } else {
          cp_async_16(there + at(first + i * (kThreads / kChunks), chunk), panel[i], panel_there[i] && inside);
        }
        panel[i] += panel_step;
      }
      left -= kDepth;
    }
    static __device__ __forceinline__ int column_row(int i) {
      return threadIdx.x / (kFrags > 0 ? kFrags : 1) + i * (kThreads / (kFrags > 0 ? kFrags : 1));
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

  // The router's rows: chunks of 8 k, which nobody but the thread that copies them reads. Terms: [3][8 kRouter] rows as
  // those of a panel.
  struct Router {
    const float* from[kRouterEach > 0 ? kRouterEach : 1];
    bool there[kRouterEach > 0 ? kRouterEach : 1], direct;
    int left;

    __device__ __forceinline__ Router(const Panel& p, int64_t k0, int64_t k1)
        : direct(p.router_direct), left(static_cast<int>(k1 - k0)) {
#pragma unroll
      for (int i = 0; i < kRouterEach; ++i) {
        const int at = threadIdx.x + i * kThreads, row = at / kChunks;
        there[i] = row < p.router_rows;
        from[i] = static_cast<const float*>(p.router);
        if (there[i]) from[i] += row * p.router_ld + k0 + 8 * (at % kChunks);
      }
    }
    static __device__ __forceinline__ bool owns(int i) {
      return 8 * kRouter * kChunks % kThreads == 0 || threadIdx.x + i * kThreads < 8 * kRouter * kChunks;
    }
    static __device__ __forceinline__ float* half_of(float* raw, int i, int half) {
      return raw + 4 * (half * (8 * kRouter * kChunks) + threadIdx.x + i * kThreads);
    }
    __device__ __forceinline__ void copy(float* raw) {
#pragma unroll
      for (int i = 0; i < kRouterEach; ++i) {
        if (!owns(i)) break;
        const int n = there[i] ? left - 8 * static_cast<int>(threadIdx.x % kChunks) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          stage_chunk(half_of(raw, i, half), from[i] + (there[i] ? 4 * half : 0), n - 4 * half, direct);
        if (there[i]) from[i] += kDepth;
      }
      left -= kDepth;
    }
    // Whole warps take part: a row's chunks are those of neighbouring lanes.
    static __device__ __forceinline__ void cut(float* raw, T* terms, float* inverse) {
#pragma unroll
      for (int i = 0; i < kRouterEach; ++i) {
        if (!owns(i)) break;
        const int mine = threadIdx.x + i * kThreads, row = mine / kChunks, chunk = mine % kChunks;
        float w[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 four = *reinterpret_cast<const float4*>(half_of(raw, i, half));
          w[4 * half] = four.x;
          w[4 * half + 1] = four.y;
          w[4 * half + 2] = four.z;
          w[4 * half + 3] = four.w;
        }
        if constexpr (std::is_same<T, __half>::value) {
          float top = 0.0f;
#pragma unroll
          for (int j = 0; j < 8; ++j) top = fabsf(w[j]) > top ? fabsf(w[j]) : top;
          const float scale = half_scale(warp_max<kChunks>(top));
#pragma unroll
          for (int j = 0; j < 8; ++j) w[j] *= scale;
          if (chunk == 0) inverse[row] = 1.0f / scale;
        }
#pragma unroll
        for (int term = 0; term < 3; ++term) {
          uint4 bits;
          uint32_t* const pairs = reinterpret_cast<uint32_t*>(&bits);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            pairs[j] = pack2<T>(w[2 * j], w[2 * j + 1]);
            const float2 taken = unpack2<T>(pairs[j]);
            w[2 * j] -= taken.x;
            w[2 * j + 1] -= taken.y;
          }
          *reinterpret_cast<uint4*>(terms + at(8 * kRouter * term + row, chunk)) = bits;
        }
      }
    }
  };

  // ---- products ----

  __device__ __forceinline__ void add_panel(const uint32_t (&x)[kRowFrags][kSteps][4], const T* from) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int f = 0; f < kFrags; f += 2) {
      uint32_t b[2][kSteps / 2][4];  // 32 k each
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < kSteps / 2; ++half) {
          if constexpr (Form::kColumns) {
            ldmatrix_x4_trans(b[j][half], from + at_column(32 * half + lane, f + j));
          } else {
            ldmatrix_x4(b[j][half], from + at(8 * (f + j) + lane % 8, 4 * half + lane / 8));
          }
        }
      float part[kRowFrags][2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int m = 0; m < kRowFrags; ++m) {
            const uint32_t(&four)[4] = b[j][step / 2];
            mma_m16n8k16<T>(part[m][j], x[m][step], {four[2 * (step % 2)], four[2 * (step % 2) + 1]});
          }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int m = 0; m < kRowFrags; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[m][f + j][i] += part[m][j][i];
    }
  }

  // Fragments first and first + 1 of the router's, or as many as there are.
  __device__ __forceinline__ void add_router(const uint32_t (&x)[kRowFrags][kSteps][4], const T* terms,
                                             const float* inverse, int first) {
    constexpr int kTogether = kRouter > 1 ? 2 : 1;
    const int lane = threadIdx.x % kWarp;
    float part[kRowFrags][kTogether][4] = {};
#pragma unroll
    for (int term = 0; term < 3; ++term)
#pragma unroll
      for (int half = 0; half < kSteps / 2; ++half) {
        uint32_t b[kTogether][4];
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
          ldmatrix_x4(b[j], terms + at(8 * (kRouter * term + first + j) + lane % 8, 4 * half + lane / 8));
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int j = 0; j < kTogether; ++j)
#pragma unroll
            for (int m = 0; m < kRowFrags; ++m)
              mma_m16n8k16<T>(part[m][j], x[m][2 * half + step], {b[j][2 * step], b[j][2 * step + 1]});
      }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      float2 unscale = make_float2(1.0f, 1.0f);
      if constexpr (std::is_same<T, __half>::value)
        unscale = *reinterpret_cast<const float2*>(inverse + 8 * (first + j) + 2 * (lane % 4));
#pragma unroll
      for (int m = 0; m < kRowFrags; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          total[m][kFrags + first + j][i] += part[m][j][i] * (i % 2 == 0 ? unscale.x : unscale.y);
    }
  }

  __device__ __forceinline__ void compute(const T* from, const T* terms, const float* inverse, int routers) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    uint32_t x[kRowFrags][kSteps][4];
#pragma unroll
    for (int m = 0; m < kRowFrags; ++m)
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        ldmatrix_x4(x[m][step], from + at(16 * (kRowFrags * warp + m) + lane % 16, 2 * step + lane / 16));
    if constexpr (kFrags > 0) add_panel(x, from + kPanelAt);
#pragma unroll
    for (int q = 0; q < kRouter; q += 2) {
      if (kRouter > 2 && q >= routers) break;
      add_router(x, terms, inverse, q);
    }
  }

  template <class Stage>
  __device__ __forceinline__ void pipeline(const Panel& panel, int64_t k0, int64_t k1, T* shared, Stage stage) {
    const int steps = static_cast<int>((k1 - k0 + kDepth - 1) / kDepth), routers = (panel.router_rows + 7) / 8;
    T* const terms = shared + kStages * kStage;                        // [2][kTerms]
    float* const raw = reinterpret_cast<float*>(terms + 2 * kTerms);  // [kStages][kRaw]
    float* const inverse = raw + kStages * kRaw;                       // [2][8 kRouter]
    Router router(panel, k0, k1);
    // The router's copies are a stage ahead of the others.
    if constexpr (kRouter > 0) {
      router.copy(raw);
      cp_async_commit();
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) stage(shared + s * kStage);
      if (kRouter > 0 && s + 1 < steps) router.copy(raw + (s + 1) * kRaw);
      cp_async_commit();
    }
    if constexpr (kRouter > 0) {
      cp_async_wait<kStages - 1>();
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
        if (step + kStages < steps) router.copy(raw + slot * kRaw);
        cp_async_commit();
        if (step + 1 < steps) router.cut(raw + next * kRaw, terms + (1 - now) * kTerms, inverse + (1 - now) * 8 * kRouter);
      } else {
        cp_async_commit();
      }
      compute(shared + slot * kStage, terms + now * kTerms, inverse + now * 8 * kRouter, routers);
      slot = next;
    }
    cp_async_wait<0>();
  }

  // row_of(m): pointer to row m of the tile, or null. any: an address of x, never read through. k0: of whole stages.
  template <class RowOf>
  __device__ __forceinline__ void run(const Panel& panel, int64_t k0, int64_t k1, bool x_direct, T* shared,
                                      const T* any, const RowOf& row_of) {
#pragma unroll
    for (int m = 0; m < kRowFrags; ++m)
#pragma unroll
      for (int f = 0; f < kFrags + kRouter; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[m][f][i] = 0.0f;
    if (x_direct && (kFrags == 0 || panel.direct) && k1 % 8 == 0) {
      pipeline(panel, k0, k1, shared, Whole(panel, k0, k1, any, row_of));
    } else {
      pipeline(panel, k0, k1, shared, Any<RowOf>{panel, k0, k1, any, x_direct, row_of});
    }
  }

  // f(m, n, value, next) for pairs of neighbouring columns n, n + 1 of this thread, of fragments of 16 rows; router
  // columns start at 8 kFrags. A thread's rows are warp_row() + 16 frag + lane / 4 and that + 8.
  template <class F>
  __device__ __forceinline__ void each_pair(int frag, int half, const F& f) const {
    const int lane = threadIdx.x % kWarp, m = row(frag, half);
#pragma unroll
    for (int i = 0; i < kFrags + kRouter; ++i)
      f(m, 8 * i + 2 * (lane % 4), total[frag][i][2 * half], total[frag][i][2 * half + 1]);
  }
  static __device__ __forceinline__ int row(int frag, int half) {
    return 16 * (kRowFrags * (threadIdx.x / kWarp) + frag) + threadIdx.x % kWarp / 4 + 8 * half;
  }
};

}  // namespace moa
