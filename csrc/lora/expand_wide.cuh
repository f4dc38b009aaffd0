// What the two wide tiles of expand_wide.cu have in common, for many tokens in 16-bit types:
//
//   y[row][o] = base + bias + sum over steps of sum_i c[row][step][i] panel[step][i][o],  i in 0 .. 15
//
// A step is 16 ranks of an expert, or the router's rows of eight experts in two terms. A block has 256 rows (tokens), a
// warp 32 of them: a group. A group's coefficients lie in global memory as the product's registers (expand_fragments), a
// fragment of 1 KB a step. Where steps are few, all of them are multiplied for all rows (expand_dense.cuh); else a warp
// takes those that one of its rows takes part in (expand_listed.cuh).
//
// 0 times what is not finite is not 0: a warp whose sums are not finite makes them again, of what each row chose alone.
#pragma once
#include "lora/expand_params.cuh"

namespace moa {

struct WideParams {
  ExpandParams e;
  int words, steps, lora_steps, depth, fragments_each, entries, kept;  // plan_cuda::ExpandWide
  uint32_t every;        // steps that each group is to have, if used or not
  uint32_t* masks;       // [groups][words] steps a group takes part in
  uint4* fragments;      // [groups][fragments_each][2][32]
  __nv_bfloat16* terms;  // [blocks of 8 experts][8 upper, 8 lower][width] of the router's weight, or null
  bool terms_direct;     // rows of terms are whole 16-byte chunks
  bool whole_chunks;     // nothing of the panels is to be taken by element
  bool eights;           // y, base and bias can be taken by eight elements
};

struct WideStep {
  const void* from;  // its first rank and column
  int ranks;         // there are; 0 .. 16
  int router;
};
static_assert(sizeof(WideStep) == plan_cuda::kWideEntry, "as the plan counts");

// A warp's sums: 32 rows by 8 kFrags columns.
template <class T, bool kByRows, int kFrags>  // panel_o = rank, panel_j = 1; else panel_j = width, panel_o = 1
struct WideSums {
  static constexpr int kThreads = plan_cuda::kWideThreads, kGroups = plan_cuda::kWideGroups;
  static constexpr int kColumns = plan_cuda::kWideColumns;

  const WideParams& p;
  const int lane, warp, g, q;
  float sum[2][kFrags][4];  // [m][f][2 h + b]: row 16 m + 8 h + g, column column(f, b)

  __device__ __forceinline__ explicit WideSums(const WideParams& p)
      : p(p), lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp), g(lane / 4), q(lane % 4) {}

  // By rows a thread's columns are eight neighbours of every 32: B's rows are taken in that order. By columns they are
  // pairs, as the product has them.
  __device__ __forceinline__ int column(int f, int b) const {
    return kByRows ? f / 4 * 32 + 8 * q + f % 4 * 2 + b : 8 * f + 2 * q + b;
  }

  // ---- steps ----

  __device__ __forceinline__ WideStep step_of(int id) const {
    const ExpandParams& e = p.e;
    if (id >= p.lora_steps) {
      const int64_t rows = (id - p.lora_steps) / 2 * 16;
      return {p.terms + rows * e.width, 16, 1};
    }
    const int expert = id / p.depth, rank = id % p.depth * 16;
    const int64_t at = int64_t{expert} * e.c.rank * e.width + rank * e.panel_j;
    const void* const from = e.panel_f32 ? static_cast<const void*>(static_cast<const float*>(e.panel) + at)
                                         : static_cast<const void*>(static_cast<const T*>(e.panel) + at);
    const int ranks = static_cast<int>(e.c.used(expert)) - rank;
    return {from, ranks < 16 ? ranks : 16, 0};
  }

  // A chunk of a step: eight elements, of which `n` are there, `offset` behind its first rank and column.
  __device__ __forceinline__ void stage(T* to, const WideStep& from, int64_t offset, int n) const {
    using Bf = __nv_bfloat16;
    const int64_t at = n > 0 ? offset : 0;
    if (from.router != 0) {
      stage_chunk(reinterpret_cast<Bf*>(to), static_cast<const Bf*>(from.from) + at, n, p.terms_direct);
    } else if (p.e.panel_f32) {
      stage_chunk(to, static_cast<const float*>(from.from) + at, n, false);
    } else {
      stage_chunk(to, static_cast<const T*>(from.from) + at, n, p.e.panel_direct);
    }
  }

  // ---- sums ----

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int f = 0; f < kFrags; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][f][i] = 0.0f;
  }

  // The sums again, one by one: of steps 0 .. steps - 1 those of which takes_part says so, step_at(u) each.
  template <class Takes, class At>
  __device__ __forceinline__ void sum_exactly(int64_t o0, const uint4* fragment, int steps, const Takes& takes_part,
                                              const At& step_at) {
    clear();
#pragma unroll 1
    for (int u = 0; u < steps; ++u) {
      if (!takes_part(u)) continue;
      const WideStep s = step_at(u);
      const auto coefficient = [&](int row, int k) {  // row g + 8 `row`
        const int pair = 2 * (row / 2 * kWarp * 4 + (g * 4 + k / 2 % 4) * 4 + row % 2 + k / 8 * 2) + k % 2;
        return s.router != 0 ? to_acc(reinterpret_cast<const __nv_bfloat16*>(fragment)[pair])
                             : to_acc(reinterpret_cast<const T*>(fragment)[pair]);
      };
      bool chose[4] = {};
      for (int k = 0; k < 16; ++k)
#pragma unroll
        for (int row = 0; row < 4; ++row) chose[row] = chose[row] || coefficient(row, k) != 0.0f;
      for (int k = 0; k < s.ranks; ++k) {
        float c[4];
#pragma unroll
        for (int row = 0; row < 4; ++row) c[row] = coefficient(row, k);
#pragma unroll
        for (int i = 0; i < 2 * kFrags; ++i) {
          const int64_t o = o0 + column(i / 2, i % 2);
          if (o >= p.e.width) continue;
          const int64_t at = s.router != 0 ? k * p.e.width + o : k * p.e.panel_j + o * p.e.panel_o;
          const float w = s.router != 0   ? to_acc(static_cast<const __nv_bfloat16*>(s.from)[at])
                          : p.e.panel_f32 ? to_acc(from_acc<T>(static_cast<const float*>(s.from)[at]))
                                          : to_acc(static_cast<const T*>(s.from)[at]);
#pragma unroll
          for (int row = 0; row < 4; ++row)  // a router's step has eight experts
            if (s.router != 0 ? c[row] != 0.0f : chose[row]) sum[row / 2][i / 2][row % 2 * 2 + i % 2] += c[row] * w;
        }
      }
      fragment += 2 * kWarp;
    }
  }

  __device__ __forceinline__ bool finite() const {
    float none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        none[i] = fmaf(sum[0][f][i], 0.0f, none[i]);
        none[i] = fmaf(sum[1][f][i], 0.0f, none[i]);
      }
    return none[0] + none[1] + none[2] + none[3] == 0.0f;
  }

  // ---- y ----

  // Of four lanes' four registers: lane q has register q of each.
  __device__ __forceinline__ void turn(uint32_t (&v)[4]) const {
#pragma unroll
    for (int by = 1; by < 4; by *= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int lo = by == 1 ? 2 * i : i, hi = lo + by;
        const bool upper = (q & by) != 0;
        const uint32_t other = __shfl_xor_sync(kFullMask, upper ? v[lo] : v[hi], by);
        v[lo] = upper ? other : v[lo];
        v[hi] = upper ? v[hi] : other;
      }
  }
  static __device__ __forceinline__ void store(T* to, const uint32_t (&v)[4], int n, bool whole) {
    if (whole) {
      *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
      return;
    }
    alignas(16) T one[8];
    memcpy(one, v, 16);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < n) to[i] = one[i];
  }
  static __device__ __forceinline__ uint4 eight(const T* from, int n, bool whole) {
    if (whole) return *reinterpret_cast<const uint4*>(from);
    alignas(16) T one[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) one[i] = i < n ? from[i] : from_acc<T>(0.0f);
    return *reinterpret_cast<const uint4*>(one);
  }

  // Bias and base of a token from column o on, where there are any; backward has neither.
  __device__ __forceinline__ uint4 bias_at(int64_t o, int n) const {
    const T* const bias = kByRows ? static_cast<const T*>(p.e.bias) : nullptr;
    return bias == nullptr ? make_uint4(0, 0, 0, 0) : eight(bias + o, n, p.eights && n == 8);
  }
  __device__ __forceinline__ uint4 base_at(int64_t token, int64_t o, int n) const {
    const T* const base = kByRows ? static_cast<const T*>(p.e.base) : nullptr;
    if (base == nullptr || token < 0) return make_uint4(0, 0, 0, 0);
    return eight(base + token * p.e.ldbase + o, n, p.eights && n == 8);
  }
  // Eight neighbours of row 8 row + g, from column 32 i + 8 q on, with what is to be added to them.
  __device__ __forceinline__ void round_row(uint32_t (&v)[4], int row, int i, uint4 bias, uint4 base) const {
    const bool adds = kByRows && (p.e.bias != nullptr || p.e.base != nullptr);
    const uint32_t x[4] = {bias.x, bias.y, bias.z, bias.w}, z[4] = {base.x, base.y, base.z, base.w};
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const float* const pair = sum[row / 2][4 * i + f] + row % 2 * 2;
      float2 s = make_float2(pair[0], pair[1]);
      if (adds) {
        const float2 d = unpack2<T>(x[f]), u = unpack2<T>(z[f]);
        s = make_float2(s.x + d.x + u.x, s.y + d.y + u.y);
      }
      v[f] = pack2<T>(s.x, s.y);
    }
    if (!kByRows) turn(v);
  }
};

}  // namespace moa
