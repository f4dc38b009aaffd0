// The tile of tile.cuh on tensor cores: T bfloat16 or float16, 8 kFrags columns, float32 sums.
//
// Both operands pass through shared memory in stages of 64 k: rows of 128 bytes whose 16-byte chunks are exchanged by
// chunk ^ (row % 8), so that neither copies nor ldmatrix meet a bank twice. A panel by columns stays as it lies,
// [k][n], and is turned by ldmatrix_trans.
//
// Products of one stage are summed on the tensor cores and then added to the total by ordinary additions: tensor cores
// cut sums off instead of rounding them, which over thousands of k would show in the router's logits.
//
// Router rows are float32 and keep that accuracy: w = hi + mid + lo, three T terms of one accumulator. Three bfloat16
// hold 24 bits, so the products x hi, x mid, x lo are exact and sum to x w. float16 has the bits but not the range:
// each row's 64 elements are scaled by a power of two that brings the largest to 2^14 .. 2^15, undone as the stage is
// added. A tile of FFMAs would take E times longer than x's bytes from E = 16 on. x of inf gives NaN (inf times a term
// of 0).
#pragma once
#include "lora/tile.cuh"

namespace moa {

template <class T, int kFrags>
struct MmaTile {
  static constexpr int kRows = plan_cuda::kTileRows, kDepth = plan_cuda::kTileDepth;
  static constexpr int kThreads = plan_cuda::kTileThreads, kStages = plan_cuda::stages(kFrags);
  static constexpr int kRowsEach = kRows * 8 / kThreads;  // chunks of x per thread and stage
  static_assert(kDepth == 64 && kRows == kThreads / 2, "8 chunks a row; a warp for 16 rows");

  Panel panel;
  int64_t k1;
  bool x_direct;
  int frags, router_frags;  // of the panel in use
  T* shared;                // [kStages][kRows + 8 units][kDepth]
  float* unscale;           // [kStages][8 router_frags]
  int stage_size;           // elements
  int64_t column;           // in a panel by columns: where this thread's fragment starts,
  int column_count;         // and how many columns of it are there
  float total[kFrags][4];   // as mma_m16n8k16 lays c out; warp w has rows 16 w ..; fragments, then the router's

  // `units`: fragments a stage has room for, three per router fragment; the same for every block of the launch.
  __device__ __forceinline__ MmaTile(const Panel& panel, int64_t k1, bool x_direct, T* shared, int units)
      : panel(panel),
        k1(k1),
        x_direct(x_direct),
        frags((panel.rows + 7) / 8),
        router_frags((panel.router_rows + 7) / 8),
        shared(shared),
        stage_size((kRows + 8 * units) * kDepth) {
    unscale = reinterpret_cast<float*>(shared + kStages * stage_size);
    const int frag = threadIdx.x % kFrags;
    column = 8 * frag;
    column_count = panel.rows - 8 * frag;
    if (panel.each == 0) return;
    const int64_t of_expert = (panel.each + 7) / 8, expert = (panel.first + frag) / of_expert;
    const int64_t start = 8 * (panel.first + frag - expert * of_expert);
    column = expert * panel.apart + start;
    column_count = static_cast<int>(panel.each - start);
  }

  static __device__ __forceinline__ int at(int row, int chunk) { return row * kDepth + ((chunk ^ (row & 7)) * 8); }
  // In a panel by columns: rows of kFrags chunks, 8 of which (in one or several rows) cover the banks.
  static __device__ __forceinline__ int at_column(int k, int frag) {
    constexpr int kTogether = kFrags >= 8 ? 1 : 8 / kFrags;
    return (k * kFrags + (frag ^ (k / kTogether & (kFrags < 8 ? kFrags - 1 : 7)))) * 8;
  }

  template <class S>
  __device__ __forceinline__ void stage_panel(T* to, int64_t k) const {
    const S* const base = static_cast<const S*>(panel.base);
    if (panel.columns) {  // a thread's fragment is always the same
      const int frag = threadIdx.x % kFrags;
      if (frag >= frags) return;
      for (int row = threadIdx.x / kFrags; row < kDepth; row += kThreads / kFrags) {
        const int64_t n = k + row < k1 ? column_count : 0;
        stage_chunk(to + at_column(row, frag), n > 0 ? base + (k + row) * panel.ld + column : base, n, panel.direct);
      }
    } else {
      for (int i = threadIdx.x; i < frags * 64; i += kThreads) {
        const int row = i / 8, chunk = i % 8;
        const int64_t n = row < panel.rows ? k1 - (k + 8 * chunk) : 0;
        stage_chunk(to + at(row, chunk), n > 0 ? base + row * panel.ld + k + 8 * chunk : base, n, panel.direct);
      }
    }
  }

  // Whole warps take part: a row's eight chunks are those of eight neighbouring lanes.
  __device__ __forceinline__ void stage_router(T* to, float* inverse, int64_t k) const {
    const float* const base = static_cast<const float*>(panel.router);
    for (int i = threadIdx.x; i < router_frags * 64; i += kThreads) {
      const int row = i / 8, chunk = i % 8;
      const int64_t n = row < panel.router_rows ? k1 - (k + 8 * chunk) : 0;
      float w[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) w[j] = j < n ? base[row * panel.router_ld + k + 8 * chunk + j] : 0.0f;
      if constexpr (std::is_same<T, __half>::value) {
        float top = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) top = fabsf(w[j]) > top ? fabsf(w[j]) : top;
        const float scale = half_scale(warp_max<8>(top));
#pragma unroll
        for (int j = 0; j < 8; ++j) w[j] *= scale;
        if (chunk == 0) inverse[row] = 1.0f / scale;
      }
#pragma unroll
      for (int term = 0; term < 3; ++term) {
        alignas(16) T v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          v[j] = from_acc<T>(w[j]);
          w[j] -= to_acc(v[j]);
        }
        const int unit_row = 8 * (frags + 3 * (row / 8) + term) + row % 8;
        *reinterpret_cast<uint4*>(to + at(unit_row, chunk)) = *reinterpret_cast<const uint4*>(v);
      }
    }
  }

  __device__ __forceinline__ void stage(int slot, const T* const (&rows)[kRowsEach], const T* any, int64_t k) const {
    T* const to = shared + slot * stage_size;
    const int first = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const int64_t n = k1 - (k + 8 * chunk);
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const bool there = rows[i] != nullptr && n > 0;
      stage_chunk(to + at(first + i * (kThreads / 8), chunk), there ? rows[i] + k + 8 * chunk : any, there ? n : 0,
                  x_direct);
    }
    T* const panel_to = to + kRows * kDepth;
    if (panel.f32) {
      stage_panel<float>(panel_to, k);
    } else {
      stage_panel<T>(panel_to, k);
    }
    if (router_frags > 0) stage_router(panel_to, unscale + slot * 8 * router_frags, k);
  }

  // part += this warp's rows of the stage times a fragment of the panel.
  __device__ __forceinline__ void multiply(float (&part)[4], const uint32_t (&x)[4][4], const T* from, int frag) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[4];  // 32 k
      if (panel.columns) {
        ldmatrix_x4_trans(b, from + at_column(32 * half + lane, frag));
      } else {
        ldmatrix_x4(b, from + at(8 * frag + lane % 8, 4 * half + lane / 8));
      }
      mma_m16n8k16<T>(part, x[2 * half], {b[0], b[1]});
      mma_m16n8k16<T>(part, x[2 * half + 1], {b[2], b[3]});
    }
  }

  __device__ __forceinline__ void compute(int slot) {
    const T* const from = shared + slot * stage_size;
    const T* const panel_from = from + kRows * kDepth;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    uint32_t x[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) ldmatrix_x4(x[step], from + at(16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
      if (f >= frags + router_frags) continue;
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f}, scale0 = 1.0f, scale1 = 1.0f;
      if (f < frags) {
        multiply(part, x, panel_from, f);
      } else {
        const int q = f - frags;
        for (int term = 0; term < 3; ++term) multiply(part, x, panel_from, frags + 3 * q + term);
        if constexpr (std::is_same<T, __half>::value) {
          const float* const inverse = unscale + slot * 8 * router_frags + 8 * q + 2 * (lane % 4);
          scale0 = inverse[0];
          scale1 = inverse[1];
        }
      }
      total[f][0] += part[0] * scale0;
      total[f][1] += part[1] * scale1;
      total[f][2] += part[2] * scale0;
      total[f][3] += part[3] * scale1;
    }
  }

  // row_of(m): pointer to row m of the tile, or null. any: an address of x, never read through.
  template <class RowOf>
  __device__ __forceinline__ void run(int64_t k0, const T* any, const RowOf& row_of) {
    const T* rows[kRowsEach];
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) rows[i] = row_of(static_cast<int>(threadIdx.x / 8 + i * (kThreads / 8)));
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[f][i] = 0.0f;
    const int64_t steps = (k1 - k0 + kDepth - 1) / kDepth;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) stage(s, rows, any, k0 + s * kDepth);
      cp_async_commit();
    }
    int slot = 0;
    for (int64_t step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there; everybody has left the one that is filled next
      const int64_t ahead = step + kStages - 1;
      if (ahead < steps) stage(slot == 0 ? kStages - 1 : slot - 1, rows, any, k0 + ahead * kDepth);
      cp_async_commit();
      compute(slot);
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
    cp_async_wait<0>();
  }

  // f(m, n, value, next) for pairs of neighbouring columns n, n + 1 of this thread; router columns start at
  // 8 frags. A thread's rows are 16 warp + lane / 4 and that + 8.
  template <class F>
  __device__ __forceinline__ void each_pair(int half, const F& f) const {
    const int lane = threadIdx.x % kWarp, m = threadIdx.x / kWarp * 16 + lane / 4 + 8 * half;
#pragma unroll
    for (int i = 0; i < kFrags; ++i) {
      if (i < frags + router_frags) f(m, 8 * i + 2 * (lane % 4), total[i][2 * half], total[i][2 * half + 1]);
    }
  }
};

}  // namespace moa
