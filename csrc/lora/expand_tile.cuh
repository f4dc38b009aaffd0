// The tensor-core tile of expand.cu: 128 rows (tokens) by columns of y, for 16-bit types.
//
//   y[row][o] = base + bias + sum over steps (e, j0) of sum_i c[row, e, j0 + i] panel_e[j0 + i][o],  i in 0 .. 15
//   c[row, e, j] = w s v[p][j] where the row's token chose e, else 0
//
// A step is 16 ranks of an expert that some token of the tile chose; 8 rows that share it are a fragment of
// coefficients, 256 bytes, made once per block and there for all columns. Fragments without a choice are left out: none
// where experts are few (then this is the dense, masked product), most where they are many.
//
// Nothing waits for another warp in the main loop. A warp owns strips of 32 columns: sums of 128 rows are 128 registers
// a thread, and the strip of the panel that a step needs, 1 KB, comes to the warp's own ring of stages by asynchronous
// copies that run kStages - 1 steps ahead, across strips too.
//
// Weights are the 16 rows of the product, tokens its 8 columns. Which rank is which k, and which column which row, is
// free as long as both operands agree, so that a lane has 4 ranks in a row (8 bytes) of both operands and ends with 4
// columns in a row of a token (8 bytes of y): lane 4 g + q has ranks 4 q .. 4 q + 3 and columns 4 g .. 4 g + 3.
#pragma once
#include "lora/expand_order.cuh"

namespace moa {

struct ExpandParams {
  DType type;
  Coefficients c;
  int64_t tokens, width;
  const void* panel;  // element (e, j, o) at e rank width + j panel_j + o panel_o
  int64_t panel_j, panel_o;
  bool panel_f32, panel_direct;  // float under 16-bit y; rows are whole 16-byte chunks
  const void* dz;                // [slots] or null
  const void* router;            // [experts, width] accumulator type
  const void* base;              // [tokens, width], rows ldbase apart, or null; may be y
  int64_t ldbase;
  const void* bias;  // [width] or null
  void* y;           // [tokens, width]
  // Tensor cores
  bool fours;           // y, base and bias can be taken by four elements
  const Place* places;  // [slots]
  const int32_t* rows;  // [tokens], or null: row t is token t
  int fragments;        // of coefficients that shared memory holds
  int64_t units;        // of 128 columns per block
};

template <class T, bool kByRows>  // panel_o = rank, panel_j = 1; else panel_j = width, panel_o = 1
struct ExpandTile {
  static constexpr int kRows = plan_cuda::kExpandRows, kThreads = plan_cuda::kExpandThreads, kFrags = kRows / 8;
  static constexpr int kStages = plan_cuda::kExpandStages, kStrip = plan_cuda::kExpandStrip;
  static constexpr int kStage = 16 * kStrip, kFragment = 8 * 16;  // elements
  static_assert(kFrags == 16 && kStrip == 32, "a bit of 16 per fragment; 4 columns of a strip a lane");

  struct Step {
    int expert, rank, used;  // ranks from `rank` on, below `used`
    uint16_t mask, first;    // fragments that take part, and where they start
  };
  struct alignas(16) Head {
    T ring[kThreads / kWarp][kStages][kStage];
    int token[kRows];  // or -1
    int steps, fragments, next;
  };
  static_assert(plan_cuda::kExpandHead == sizeof(Head) && plan_cuda::kExpandStep == sizeof(Step), "as the plan counts");

  const ExpandParams& p;
  Head* const head;
  T* const coef;           // [fragments][8][16]
  float* const dz;         // [fragments][8], where p.dz
  Step* const step;        // [fragments]
  unsigned* const expert;  // [experts] mask of the fragments that chose it; above 16 bits the first one of this chunk
  const int lane, warp, g, q;
  float sum[kFrags][2][4];  // [.][f][2 i + u]: column 4 g + 2 f + i of row 2 q + u of the fragment

  __device__ __forceinline__ ExpandTile(const ExpandParams& p, unsigned char* shared)
      : p(p),
        head(reinterpret_cast<Head*>(shared)),
        coef(reinterpret_cast<T*>(head + 1)),
        dz(reinterpret_cast<float*>(coef + p.fragments * kFragment)),
        step(reinterpret_cast<Step*>(dz + (p.dz == nullptr ? 0 : p.fragments * 8))),
        expert(reinterpret_cast<unsigned*>(step + p.fragments)),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        g(lane / 4),
        q(lane % 4) {}

  // ---- what the tile's tokens chose ----

  __device__ __forceinline__ void find_experts(int64_t row0) {
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      const int64_t row = row0 + i;
      head->token[i] = row >= p.tokens ? -1 : p.rows == nullptr ? static_cast<int>(row) : p.rows[row];
    }
    for (int i = threadIdx.x; i < p.c.experts; i += kThreads) expert[i] = 0;
    __syncthreads();
    const int row = threadIdx.x, token = head->token[row];
    for (int64_t j = 0; token >= 0 && j < p.c.top_k; ++j) {
      const int e = p.places[token * p.c.top_k + j].expert;
      if (e >= 0 && e < p.c.experts) atomicOr(&expert[e], 1u << row / 8);
    }
    __syncthreads();
  }

  __device__ __forceinline__ int scan(int v) const {  // over the lanes, the own one included
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const int other = __shfl_up_sync(kFullMask, v, by);
      if (lane >= by) v += other;
    }
    return v;
  }

  // The steps of experts from `from` on, as many as there is room for; one warp.
  __device__ __forceinline__ void list_steps(int from) const {
    const int experts = static_cast<int>(p.c.experts);
    int steps = 0, fragments = 0, e0 = from, fitting = kWarp;
    for (; e0 < experts && fitting == kWarp; e0 += fitting) {
      const int e = e0 + lane;
      const unsigned mask = e < experts ? expert[e] & 0xffffu : 0u;
      const int used = mask == 0 ? 0 : static_cast<int>(p.c.used(e));
      int depth = (used + 15) / 16;
      if (mask != 0 && depth == 0 && p.dz != nullptr) depth = 1;
      const int each = __popc(mask), size = depth * each;
      const int fragments_to = fragments + scan(size), steps_to = steps + scan(depth);
      const unsigned beyond = __ballot_sync(kFullMask, fragments_to > p.fragments);
      fitting = beyond == 0 ? kWarp : __ffs(static_cast<int>(beyond)) - 1;
      if (lane < fitting && size > 0) {
        const int first = fragments_to - size;
        expert[e] = mask | static_cast<unsigned>(first) << 16;
        for (int s = 0; s < depth; ++s)
          step[steps_to - depth + s] = {e, 16 * s, used, static_cast<uint16_t>(mask),
                                        static_cast<uint16_t>(first + s * each)};
      }
      if (fitting > 0) {
        fragments = __shfl_sync(kFullMask, fragments_to, fitting - 1);
        steps = __shfl_sync(kFullMask, steps_to, fitting - 1);
      }
    }
    if (lane == 0) {
      head->steps = steps;
      head->fragments = fragments;
      head->next = e0 < experts ? e0 : experts;
    }
  }

  // Coefficients of experts from `from` on; says where the next chunk begins. The whole block.
  __device__ __forceinline__ int make_coefficients(int from) const {
    __syncthreads();  // all have left the chunk of before
    if (warp == 0) list_steps(from);
    __syncthreads();
    const int next = head->next;
    for (int i = threadIdx.x; i < head->fragments * (kFragment / 8); i += kThreads)
      *reinterpret_cast<uint4*>(coef + 8 * i) = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; p.dz != nullptr && i < head->fragments * 8; i += kThreads) dz[i] = 0.0f;
    __syncthreads();
    const bool whole = p.c.rank % 4 == 0;  // four values are one load
    for (int64_t j = 0; j < p.c.top_k; ++j) {
#pragma unroll
      for (int part = 0; part < kRows * 4 / kThreads; ++part) {
        const int row = part * (kThreads / 4) + threadIdx.x / 4, quarter = threadIdx.x % 4, token = head->token[row];
        if (token < 0) continue;
        const int64_t slot = token * p.c.top_k + j;
        const Place place = p.places[slot];
        const int e = place.expert;
        if (e < from || e >= next) continue;
        const unsigned mask = expert[e] & 0xffffu;
        const int at = static_cast<int>(expert[e] >> 16) + __popc(mask & ((1u << row / 8) - 1u));
        const int used = static_cast<int>(p.c.used(e)), each = __popc(mask);
        const int64_t position = clamp(place.position, 0, p.c.slots - 1 - place.twins);
        for (int j0 = 4 * quarter; j0 < (used + 15) / 16 * 16; j0 += 16) {
          float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          for (int twin = 0; twin <= place.twins; ++twin) {
            const float factor = p.c.factor<float>(e, p.c.slot_at(position + twin));
            const float* const from_j = static_cast<const float*>(p.c.values) + (position + twin) * p.c.rank + j0;
            float h[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (whole && j0 < used) {
              const float4 four = *reinterpret_cast<const float4*>(from_j);
              h[0] = four.x, h[1] = four.y, h[2] = four.z, h[3] = four.w;
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i)
                if (j0 + i < used) h[i] = from_j[i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (j0 + i < used) v[i] += factor * h[i];
          }
          T* const to = coef + (at + j0 / 16 * each) * kFragment + row % 8 * 16 + 4 * quarter;
          *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
        }
        if (p.dz != nullptr && quarter == 0) {
          float v = 0.0f;
          for (int twin = 0; twin <= place.twins; ++twin) v += static_cast<const float*>(p.dz)[position + twin];
          dz[at * 8 + row % 8] = v;
        }
      }
    }
    __syncthreads();
    return next;
  }

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
    const S* const base = static_cast<const S*>(p.panel) + s.expert * p.c.rank * p.width;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int chunk = lane + i * kWarp;
      const int64_t o = o0 + (kByRows ? chunk / 2 : chunk % 4 * 8), j = s.rank + (kByRows ? chunk % 2 * 8 : chunk / 4);
      const int64_t n = o >= p.width || j >= s.used ? 0 : kByRows ? s.used - j : p.width - o;
      stage_chunk(to + at(chunk / 2) + chunk % 2 * 8, n > 0 ? base + j * p.panel_j + o * p.panel_o : base, n,
                  p.panel_direct);
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

  // ---- sums ----

  __device__ __forceinline__ void multiply(const Step& s, const T* from) {
    uint32_t a[2][4];
    weights(a, from);
    const T* at = coef + s.first * kFragment + g * 16 + 4 * q;
    const auto load = [&] { return *reinterpret_cast<const uint2*>(at); };
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
    for (int f0 = 0; f0 < kFrags; f0 += 4) {
      float4 more[8];  // loads of four fragments are under way together
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t t = head->token[8 * (f0 + i / 2) + 2 * q + i % 2];
        more[i] =
            base == nullptr || t < 0 || n == 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : four(base + t * p.ldbase + o);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
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

template <class T, bool kByRows>
__global__ void __launch_bounds__(plan_cuda::kExpandThreads, 2) expand_mma(const ExpandParams p) {
  using Tile = ExpandTile<T, kByRows>;
  MOA_DYNAMIC_SHARED(unsigned char, shared);
  Tile tile(p, shared);
  tile.find_experts(blockIdx.x * static_cast<int64_t>(Tile::kRows));
  const int experts = static_cast<int>(p.c.experts);
  constexpr int kUnit = plan_cuda::kExpandUnit;
  const int64_t unit = blockIdx.y * p.units, units = clamp((p.width + kUnit - 1) / kUnit - unit, 0, p.units);
  const int64_t o0 = unit * kUnit + tile.warp * Tile::kStrip;

  // All coefficients at once, and then strip after strip; where they do not fit, a strip at a time by chunks of experts.
  int next = tile.make_coefficients(0);
  const bool one = next == experts;
  const int strips = one ? static_cast<int>(units) : 1;
  for (int64_t done = 0; done < units; done += strips) {
    if (done > 0) next = tile.make_coefficients(0);
    for (bool begin = true, end = false; !end; begin = false) {
      if (!begin) next = tile.make_coefficients(next);
      end = next == experts;
      tile.run(o0 + done * kUnit, strips, begin, end);
    }
  }
}

}  // namespace moa
