// The tensor-core tile of expand.cu: 128 rows (tokens) by columns of y, for 16-bit types.
//
//   y[row][o] = base + bias + sum over steps (e, j0) of sum_i c[row, e, j0 + i] panel_e[j0 + i][o],  i in 0 .. 15
//
// c and the steps are made once per block (expand_coefficients.cuh) and there for all columns. Nothing waits for another
// warp after that. A warp owns strips of 32 columns: sums of 128 rows are 128 registers a thread, and the strip of the
// panel that a step needs, 1 KB, comes to the warp's own ring of stages by asynchronous copies that run kStages - 1
// steps ahead, across strips too.
//
// Weights are the 16 rows of the product, tokens its 8 columns. Which rank is which k, and which column which row, is
// free as long as both operands agree, so that a lane has 4 ranks in a row (8 bytes) of both operands and ends with 4
// columns in a row of a token (8 bytes of y): lane 4 g + q has ranks 4 q .. 4 q + 3 and columns 4 g .. 4 g + 3.
#pragma once
#include "lora/expand_coefficients.cuh"

namespace moa {

template <class T, bool kByRows>  // panel_o = rank, panel_j = 1; else panel_j = width, panel_o = 1
struct ExpandTile : ExpandCoefficients<T> {
  using Base = ExpandCoefficients<T>;
  using Base::coef, Base::dz, Base::head, Base::kFrags, Base::kFragment, Base::kRows, Base::kStage, Base::kStages;
  using Base::kStrip, Base::kThreads, Base::lane, Base::p, Base::step, Base::warp;
  using typename Base::Step;
  static_assert(kStrip == 32, "4 columns a lane");

  const int g, q;
  float sum[kFrags][2][4];  // [.][f][2 i + u]: column 4 g + 2 f + i of row 2 q + u of the fragment

  __device__ __forceinline__ ExpandTile(const ExpandParams& p, unsigned char* shared)
      : Base(p, shared), g(lane / 4), q(lane % 4) {}

  // ---- the panel ----

  // Element of 32 bytes `s` of a stage: 4 of them are a line, exchanged so that 16 lanes which read 8 bytes each of
  // every fourth column (or rank) meet no bank twice.
  static __device__ __forceinline__ int at(int s) {
    const int line = s / 4;
    return line * 64 + ((s ^ line ^ line / 4) & 3) * 16;
  }

  // By rows a stage is [32 columns][16 ranks], else [16 ranks][32 columns]; 64 chunks of 16 bytes, two a lane.
  template <class S>
  __device__ __forceinline__ void stage(T* to, const Step& s, int64_t o0) const {
    const int first_o = kByRows ? lane / 2 : lane % 4 * 8, first_j = kByRows ? lane % 2 * 8 : lane / 4;
    const int columns = static_cast<int>(clamp(p.width - o0, 0, kStrip)), ranks = s.used - s.rank;
    const S* const base = static_cast<const S*>(p.panel);
    const S* const from =
        base + s.expert * p.c.rank * p.width + (s.rank + first_j) * p.panel_j + (o0 + first_o) * p.panel_o;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int o = first_o + (kByRows ? i * 16 : 0), j = first_j + (kByRows ? 0 : i * 8);
      const int n = o >= columns || j >= ranks ? 0 : kByRows ? ranks - j : columns - o;
      stage_chunk(to + at(lane / 2 + i * 16) + lane % 2 * 8,
                  n > 0 ? from + i * (kByRows ? 16 * p.panel_o : 8 * p.panel_j) : base, n, p.panel_direct);
    }
  }

  // The two operands of 16 columns by 16 ranks.
  __device__ __forceinline__ void weights(uint32_t (&a)[2][4], const T* from) const {
    uint2 w[4];
    if constexpr (kByRows) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // ranks of column 4 g + i
        w[i] = *reinterpret_cast<const uint2*>(from + at(4 * g + i) + 4 * q);
        a[i / 2][i % 2] = w[i].x;
        a[i / 2][2 + i % 2] = w[i].y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)  // columns of rank 4 q + i
        w[i] = *reinterpret_cast<const uint2*>(from + at(2 * (4 * q + i) + g / 4) + g % 4 * 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // even and odd columns
        const unsigned halves = i == 0 ? 0x5410u : 0x7632u;
        a[0][i] = __byte_perm(w[0].x, w[1].x, halves);
        a[0][2 + i] = __byte_perm(w[2].x, w[3].x, halves);
        a[1][i] = __byte_perm(w[0].y, w[1].y, halves);
        a[1][2 + i] = __byte_perm(w[2].y, w[3].y, halves);
      }
    }
  }

  // Whether a weight's exponent is all ones: both halves of a register at once, by the carry.
  static __device__ __forceinline__ bool not_finite(const uint32_t (&a)[2][4]) {
    constexpr bool kBfloat = std::is_same<T, __nv_bfloat16>::value;
    constexpr uint32_t kExponent = kBfloat ? 0x7f807f80u : 0x7c007c00u, kOne = kBfloat ? 0x00800080u : 0x04000400u;
    uint32_t carry = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) carry |= (a[i / 4][i % 4] & kExponent) + kOne;
    return (carry & 0x80008000u) != 0;
  }

  // ---- sums ----

  __device__ __forceinline__ void multiply(const Step& s, const T* from) {
    uint32_t a[2][4];
    weights(a, from);
    const T* at = coef + s.first * kFragment + g * 16 + 4 * q;
    const auto load = [&] { return *reinterpret_cast<const uint2*>(at); };
    if (__any_sync(kFullMask, not_finite(a))) {  // 0 times what is not finite is not 0: rows that chose it, alone
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        if ((s.mask >> f & 1) == 0) continue;
        const uint2 c = load();
        const unsigned chose = __ballot_sync(kFullMask, ((c.x | c.y) & 0x7fff7fffu) != 0);
        float part[2][4] = {};
        mma_m16n8k16<T>(part[0], a[0], {c.x, c.y});
        mma_m16n8k16<T>(part[1], a[1], {c.x, c.y});
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if ((chose >> 4 * (2 * q + i % 2) & 15) != 0) sum[f][i / 4][i % 4] += part[i / 4][i % 4];
        at += kFragment;
      }
      return;
    }
    if (s.mask == 0xffffu) {
#pragma unroll
      for (int f = 0; f < kFrags; ++f, at += kFragment) {
        const uint2 c = load();
        mma_m16n8k16<T>(sum[f][0], a[0], {c.x, c.y});
        mma_m16n8k16<T>(sum[f][1], a[1], {c.x, c.y});
      }
      return;
    }
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
      if ((s.mask >> f & 1) == 0) continue;
      const uint2 c = load();
      mma_m16n8k16<T>(sum[f][0], a[0], {c.x, c.y});
      mma_m16n8k16<T>(sum[f][1], a[1], {c.x, c.y});
      at += kFragment;
    }
  }

  // The router's share, in full accuracy.
  __device__ __forceinline__ void add_router(const Step& s, int64_t o0) {
    float w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t o = o0 + 4 * g + i;
      w[i] = o < p.width ? static_cast<const float*>(p.router)[s.expert * p.width + o] : 0.0f;
    }
    const float* at = dz + s.first * 8 + 2 * q;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
      if ((s.mask >> f & 1) == 0) continue;
      const float2 z = *reinterpret_cast<const float2*>(at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[f][i / 2][i % 2 * 2] += z.x * w[i];
        sum[f][i / 2][i % 2 * 2 + 1] += z.y * w[i];
      }
      at += 8;
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[f][i / 4][i % 4] = 0.0f;
  }

  // y of the strip: base and bias are added to the sums here and nowhere else.
  __device__ __forceinline__ void store(int64_t o0) const {
    const int64_t o = o0 + 4 * g;
    const int n = static_cast<int>(clamp(p.width - o, 0, 4));
    const T* const bias = static_cast<const T*>(p.bias);
    const T* const base = static_cast<const T*>(p.base);
    const auto four = [&](const T* from) {  // as floats; 0 beyond the width
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (p.fours && n == 4) {
        const uint2 bits = *reinterpret_cast<const uint2*>(from);
        const float2 lo = unpack2<T>(bits.x), hi = unpack2<T>(bits.y);
        return make_float4(lo.x, lo.y, hi.x, hi.y);
      }
      if (n > 0) v.x = to_acc(from[0]);
      if (n > 1) v.y = to_acc(from[1]);
      if (n > 2) v.z = to_acc(from[2]);
      if (n > 3) v.w = to_acc(from[3]);
      return v;
    };
    const float4 b = bias == nullptr || n == 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : four(bias + o);
#pragma unroll
    for (int f0 = 0; f0 < kFrags; f0 += 2) {
      float4 more[4];  // loads of two fragments are under way together
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t t = head->token[8 * (f0 + i / 2) + 2 * q + i % 2];
        more[i] =
            base == nullptr || t < 0 || n == 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : four(base + t * p.ldbase + o);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int f = f0 + i / 2, u = i % 2;
        const int64_t t = head->token[8 * f + 2 * q + u];
        if (t < 0 || n == 0) continue;
        const float v0 = sum[f][0][u] + b.x + more[i].x, v1 = sum[f][0][2 + u] + b.y + more[i].y;
        const float v2 = sum[f][1][u] + b.z + more[i].z, v3 = sum[f][1][2 + u] + b.w + more[i].w;
        T* const to = static_cast<T*>(p.y) + t * p.width + o;
        if (p.fours && n == 4) {
          *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(v0, v1), pack2<T>(v2, v3));
          continue;
        }
        to[0] = from_acc<T>(v0);
        if (n > 1) to[1] = from_acc<T>(v1);
        if (n > 2) to[2] = from_acc<T>(v2);
        if (n > 3) to[3] = from_acc<T>(v3);
      }
    }
  }

  // The steps there are, for `strips` strips of this warp, 128 columns apart from o0 on. One warp; sums go on from what
  // they are unless `begin`, and are stored where `end`.
  __device__ __forceinline__ void run(int64_t o0, int strips, bool begin, bool end) {
    constexpr int kApart = kThreads / kWarp * kStrip;
    const int steps = head->steps, all = strips * steps;
    T(&ring)[kStages][kStage] = head->ring[warp];
    int ahead = 0, ahead_step = 0;  // the next copy
    int64_t ahead_o = o0;
    const auto copy = [&] {
      if (ahead < all) {
        T* const to = ring[ahead % kStages];
        if (p.panel_f32) {
          stage<float>(to, step[ahead_step], ahead_o);
        } else {
          stage<T>(to, step[ahead_step], ahead_o);
        }
        if (++ahead_step == steps) {
          ahead_step = 0;
          ahead_o += kApart;
        }
      }
      ++ahead;
      cp_async_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) copy();
    int slot = 0;
    for (int strip = 0; strip < strips; ++strip, o0 += kApart) {
      if (begin) clear();
      for (int i = 0; i < steps; ++i) {
        cp_async_wait<kStages - 2>();
        __syncwarp();  // the stage is there for all lanes, and all have left the one before, which is filled again
        copy();
        const Step s = step[i];
        multiply(s, ring[slot]);
        if (p.dz != nullptr && s.rank == 0) add_router(s, o0);
        slot = slot + 1 == kStages ? 0 : slot + 1;
      }
      if (end) store(o0);
    }
    cp_async_wait<0>();
    __syncwarp();
  }
};

// Tile `row_tile` of tokens, part `part` of the columns. `shared`: plan_cuda::Expand's bytes.
template <class T, bool kByRows>
__device__ __forceinline__ void expand_mma_block(const ExpandParams& p, int64_t row_tile, int64_t part,
                                                 unsigned char* shared) {
  using Tile = ExpandTile<T, kByRows>;
  Tile tile(p, shared);
  tile.find_experts(row_tile * Tile::kRows);
  constexpr int kUnit = plan_cuda::kExpandUnit;
  const int64_t unit = part * p.units, units = clamp((p.width + kUnit - 1) / kUnit - unit, 0, p.units);
  const int64_t o0 = unit * kUnit + tile.warp * Tile::kStrip;

  // All coefficients at once, and then strip after strip; where they do not fit, a strip at a time by chunks of experts.
  for (int64_t done = 0, from = 0; done < units;) {
    const int64_t next = tile.make_coefficients(static_cast<int>(from));
    const bool begin = from == 0, end = next == p.c.experts;
    const int strips = begin && end ? static_cast<int>(units) : 1;
    tile.run(o0 + done * kUnit, strips, begin, end);
    done += end ? strips : 0;
    from = end ? 0 : next;
  }
}

}  // namespace moa
