// The wide tensor-core tile of expand_wide.cu: 256 rows (tokens) by 64 columns of y at a time, for 16-bit types.
//
//   y[row][o] = base + bias + sum over steps of sum_i c[row][step][i] panel[step][i][o],  i in 0 .. 15
//
// A step is 16 ranks of an expert, or the router's rows of eight experts in two terms. A warp owns 32 rows: a group. Its
// coefficients lie in global memory as the product's registers (expand_fragments), one fragment of 1 KB for each step
// that one of its rows takes part in, in ascending order; the first `kept` stay in shared memory from column to column.
// The panel's strips of 64 columns come to shared memory by asynchronous copies for the whole block, eight steps a stage:
// those that one of the eight groups takes part in. A warp skips what is not its own.
//
// 0 times what is not finite is not 0: a warp whose sums are not finite makes them again, of what each row chose alone.
#pragma once
#include "lora/expand_params.cuh"

namespace moa {

struct WideParams {
  ExpandParams e;
  int words, steps, lora_steps, depth, fragments_each, entries, kept;  // plan_cuda::ExpandWide
  uint32_t* masks;                                                     // [groups][words] steps a group takes part in
  uint4* fragments;                                                    // [groups][fragments_each][2][32]
  __nv_bfloat16* terms;  // [blocks of 8 experts][8 upper, 8 lower][width] of the router's weight, or null
  bool terms_direct;     // rows of terms are whole 16-byte chunks
  bool whole_chunks;     // nothing of the panels is to be taken by element
  bool eights;           // y, base and bias can be taken by eight elements
};

template <class T, bool kByRows>  // panel_o = rank, panel_j = 1; else panel_j = width, panel_o = 1
struct WideTile {
  static constexpr int kThreads = plan_cuda::kWideThreads, kGroups = plan_cuda::kWideGroups;
  static constexpr int kColumns = plan_cuda::kWideColumns, kSteps = plan_cuda::kWideSteps;
  static constexpr int kStages = plan_cuda::kWideStages, kStage = kSteps * 16 * kColumns, kFrags = kColumns / 8;
  static_assert(kThreads == 256 && kGroups == 8 && kColumns == 64 && kSteps == 8, "numbering below");

  struct Step {
    const void* from;  // its first rank and column
    int ranks;         // there are; 0 .. 16
    int router;
  };
  static_assert(sizeof(Step) == plan_cuda::kWideEntry, "as the plan counts");

  const WideParams& p;
  T* const ring;         // [kStages][kStage]
  uint4* const mine;     // [kept][2][32] of the warp: its first fragments
  Step* const step;      // [entries]
  uint32_t* const part;  // [entries / 4] four steps of each group: bit 4 group + step % 4
  int* const counts;     // [kGroups]
  int* const token;      // [32] of the warp's rows; or -1
  const int lane, warp, g, q;
  int steps, lora;  // of the tile, and those before the router's
  const uint4* own;
  const uint4* next;        // of the fragments, in shared or global memory
  uint4 ahead[2];           // the one before it
  float sum[2][kFrags][4];  // [m][f][2 h + b]: row 16 m + 8 h + g, column column(f, b)

  __device__ __forceinline__ WideTile(const WideParams& p, unsigned char* shared)
      : p(p),
        ring(reinterpret_cast<T*>(shared)),
        mine(reinterpret_cast<uint4*>(ring + kStages * kStage) + threadIdx.x / kWarp * p.kept * 2 * kWarp +
             threadIdx.x % kWarp),
        step(reinterpret_cast<Step*>(reinterpret_cast<uint4*>(ring + kStages * kStage) + kGroups * p.kept * 2 * kWarp)),
        part(reinterpret_cast<uint32_t*>(step + p.entries)),
        counts(reinterpret_cast<int*>(part + p.entries / 4)),
        token(counts + kGroups + threadIdx.x / kWarp * 32),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        g(lane / 4),
        q(lane % 4) {}

  // By rows a thread's columns are eight neighbours of every 32: B's rows are taken in that order. By columns they are
  // pairs, as the product has them.
  __device__ __forceinline__ int column(int f, int b) const {
    return kByRows ? f / 4 * 32 + 8 * q + f % 4 * 2 + b : 8 * f + 2 * q + b;
  }

  // ---- the tile's steps ----

  __device__ __forceinline__ Step step_of(int id) const {
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

  __device__ __forceinline__ void list_steps(int64_t tile) {
    const int64_t group = tile * kGroups, groups = (p.e.tokens + 31) / 32;
    for (int i = threadIdx.x; i < p.entries / 4; i += kThreads) part[i] = 0;
    steps = lora = 0;
    for (int first = 0; first < p.steps; first += kThreads) {
      const int id = first + threadIdx.x;
      uint32_t takes = 0;  // bit 4 i: group i
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
        if (id < p.steps && group + i < groups)
          takes |= (p.masks[(group + i) * p.words + id / 32] >> id % 32 & 1u) << 4 * i;
      const unsigned some = __ballot_sync(kFullMask, takes != 0);
      const unsigned before_router = __ballot_sync(kFullMask, takes != 0 && id < p.lora_steps);
      if (lane == 0) counts[warp] = __popc(some) | __popc(before_router) << 16;
      __syncthreads();
      int at = steps + __popc(some & ((1u << lane) - 1u));
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int n = counts[i];
        at += i < warp ? n & 0xffff : 0;
        steps += n & 0xffff;
        lora += n >> 16;
      }
      if (takes != 0 && at < p.entries) {
        step[at] = step_of(id);
        atomicOr(&part[at / 4], takes << at % 4);
      }
      __syncthreads();
    }
  }

  // ---- the panel ----

  // A stage is two halves of four steps: by rows [64 columns][64 ranks], else [64 ranks][64 columns], chunks of 16 bytes
  // exchanged so that neither copies nor ldmatrix meet a bank twice.
  static __device__ __forceinline__ int key(int row) {
    return kByRows ? (row >> 4 ^ row >> 1) % 2 * 4 + row % 2 * 2 + row / 8 % 2 : row % 8;
  }
  static __device__ __forceinline__ int at(int row, int chunk) { return row * 64 + ((chunk ^ key(row)) * 8); }

  // Steps 8 stage .. 8 stage + 7, columns from o0 on; four chunks a thread.
  __device__ __forceinline__ void copy(T* to, int stage, int64_t o0) const {
    using Bf = __nv_bfloat16;
    const int columns = static_cast<int>(clamp(p.e.width - o0, 0, kColumns));
    const int i = threadIdx.x % 128, second = threadIdx.x / 128;
    // by rows: column and half of the ranks; else rank and eight columns
    const int row = kByRows ? i / 2 : i / 8, place = kByRows ? i % 2 : i % 8;
    const int64_t offset = kByRows ? (o0 + row) * p.e.panel_o + 8 * place : row * p.e.panel_j + o0 + 8 * place;
    const Step* const from = step + kSteps * stage + second;
    const int left = steps - kSteps * stage - second;
    const auto here = [&](int s) {
      return to + s / 4 * (kStage / 2) + (kByRows ? at(row, s % 4 * 2 + place) : at(s % 4 * 16 + row, place));
    };
    if (p.whole_chunks) {
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {
        if (s >= left) continue;
        const Step f = from[s];
        const bool there = kByRows ? row < columns && 8 * place < f.ranks : row < f.ranks && 8 * place < columns;
        cp_async_16(here(s + second), static_cast<const T*>(f.from) + (there ? offset : 0), there);
      }
      return;
    }
#pragma unroll 1
    for (int s = 0; s < kSteps && s < left; s += 2) {
      const Step f = from[s];
      const int n = kByRows ? (row < columns ? f.ranks - 8 * place : 0) : (row < f.ranks ? columns - 8 * place : 0);
      const int64_t there = n > 0 ? offset : 0;
      T* const shared = here(s + second);
      if (f.router != 0) {
        stage_chunk(reinterpret_cast<Bf*>(shared), static_cast<const Bf*>(f.from) + there, n, p.terms_direct);
      } else if (p.e.panel_f32) {
        stage_chunk(shared, static_cast<const float*>(f.from) + there, n, false);
      } else {
        stage_chunk(shared, static_cast<const T*>(f.from) + there, n, p.e.panel_direct);
      }
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
  __device__ __forceinline__ unsigned takes_part(int stage) const {  // a bit a step
    const uint32_t lo = part[2 * stage], hi = part[2 * stage + 1];
    return (lo >> 4 * warp & 15u) | (hi >> 4 * warp & 15u) << 4;
  }

  template <class M>
  __device__ __forceinline__ void multiply(const uint32_t (&c)[2][4], const T* from) {
    uint32_t b[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // columns of fragments 2 i and 2 i + 1, ranks 0 .. 7 and 8 .. 15
      if constexpr (kByRows) {
        ldmatrix_x4(b[i], from + i / 2 * 32 * 64 + i % 2 * 4 * 64);
      } else {
        ldmatrix_x4_trans(b[i], from + ((2 * i + lane / 16) ^ (lane % 8)) * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_m16n8k16<M>(sum[m][2 * i], c[m], {b[i][0], b[i][1]});
        mma_m16n8k16<M>(sum[m][2 * i + 1], c[m], {b[i][2], b[i][3]});
      }
  }

  __device__ __forceinline__ void load_fragment() {
    ahead[0] = next[0];
    ahead[1] = next[kWarp];
    next += 2 * kWarp;
    if (next == mine + p.kept * 2 * kWarp) next = own + p.kept * 2 * kWarp;  // behind the last one there is one more
  }
  __device__ __forceinline__ void multiply_stage(int stage, const T* from) {
    const unsigned takes = takes_part(stage);
    const int n = lane % 8, half = lane / 8 % 2, odd = lane / 16;  // ldmatrix: row, ranks from 8 on, second fragment
    const int row = kByRows ? 8 * (n / 2) + 2 * odd + n % 2 : 8 * half + n;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if ((takes >> s & 1) == 0) continue;
      const uint32_t c[2][4] = {{ahead[0].x, ahead[0].y, ahead[0].z, ahead[0].w},
                                {ahead[1].x, ahead[1].y, ahead[1].z, ahead[1].w}};
      load_fragment();
      const T* const here = from + (kByRows ? s / 4 * (kStage / 2) + at(row, s % 4 * 2 + half) : (row + s * 16) * 64);
      if (!kByRows && !std::is_same<T, __nv_bfloat16>::value && kSteps * stage + s >= lora) {
        multiply<__nv_bfloat16>(c, here);
      } else {
        multiply<T>(c, here);
      }
    }
  }

  // The sums again, one by one.
  __device__ __forceinline__ void sum_exactly(int64_t o0) {
    clear();
    const uint4* fragment = own - lane;
    for (int u = 0; u < steps; ++u) {
      if ((part[u / 4] >> (4 * warp + u % 4) & 1u) == 0) continue;
      const Step s = step[u];
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

  // A row's 64 columns, which four lanes have, by eight lanes: those of a row and of its neighbour exchange halves.
  __device__ __forceinline__ void store_rows(int row, uint32_t (&v)[2][4], int64_t o0) const {
    const int half = g % 2;
    const int64_t o = o0 + 32 * half + 8 * q;
    const int n = static_cast<int>(clamp(p.e.width - o, 0, 8));
    uint32_t other[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) other[i] = __shfl_xor_sync(kFullMask, half == 0 ? v[1][i] : v[0][i], 4);
    __syncwarp();  // the neighbour has read its base, which may be y
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // the even row, the odd row
      const int64_t t = token[8 * row + g / 2 * 2 + i];
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = i != half ? other[j] : half == 0 ? v[0][j] : v[1][j];
      if (t >= 0) store(static_cast<T*>(p.e.y) + t * p.e.width + o, w, n, p.eights && n == 8);
    }
  }

  __device__ __forceinline__ void finish(int64_t o0) const {
    if constexpr (kByRows) {
      const T* const bias = static_cast<const T*>(p.e.bias);
      const T* const base = static_cast<const T*>(p.e.base);
      const bool adds = bias != nullptr || base != nullptr;
      const int64_t o = o0 + 8 * q;
      int n[2];
      bool whole[2];
      uint4 b[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        n[i] = static_cast<int>(clamp(p.e.width - o - 32 * i, 0, 8));
        whole[i] = p.eights && n[i] == 8;
        if (bias != nullptr) b[i] = eight(bias + o + 32 * i, n[i], whole[i]);
      }
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        const int64_t t = token[8 * row + g];
        uint4 more[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          more[i] = make_uint4(0, 0, 0, 0);
          if (base != nullptr && t >= 0) more[i] = eight(base + t * p.e.ldbase + o + 32 * i, n[i], whole[i]);
        }
        uint32_t v[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t x[4] = {b[i].x, b[i].y, b[i].z, b[i].w};
          const uint32_t z[4] = {more[i].x, more[i].y, more[i].z, more[i].w};
#pragma unroll
          for (int f = 0; f < 4; ++f) {
            const float* const pair = sum[row / 2][4 * i + f] + row % 2 * 2;
            float2 s = make_float2(pair[0], pair[1]);
            if (adds) {
              const float2 d = unpack2<T>(x[f]), u = unpack2<T>(z[f]);
              s = make_float2(s.x + d.x + u.x, s.y + d.y + u.y);
            }
            v[i][f] = pack2<T>(s.x, s.y);
          }
        }
        store_rows(row, v, o0);
      }
    } else {  // backward has neither base nor bias
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        uint32_t v[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int f = 0; f < 4; ++f)
            v[i][f] = pack2<T>(sum[row / 2][4 * i + f][row % 2 * 2], sum[row / 2][4 * i + f][row % 2 * 2 + 1]);
          turn(v[i]);
        }
        store_rows(row, v, o0);
      }
    }
  }

  // Tile `tile` of rows, `units` times 64 columns from unit `unit` on.
  __device__ __forceinline__ void run(int64_t tile, int64_t unit, int units) {
    const int64_t group = tile * kGroups + warp, row = group * 32 + lane;
    token[lane] = row >= p.e.tokens ? -1 : p.e.rows == nullptr ? static_cast<int>(row) : p.e.rows[row];
    __syncwarp();
    const int64_t groups = (p.e.tokens + 31) / 32;  // warps behind the last one take part in nothing
    own = p.fragments + (group < groups ? group : 0) * p.fragments_each * 2 * kWarp + lane;
    for (int i = 0; i < 2 * p.kept; ++i) cp_async_16(mine + i * kWarp, own + i * kWarp, true);
    list_steps(tile);

    const int stages = (steps + kSteps - 1) / kSteps, all = stages * units;
    int64_t o0 = unit * kColumns, copied_o = o0;
    int copies = 0, copied_stage = 0, copied_slot = 0;
    const auto copy_next = [&] {
      if (copies < all) {
        copy(ring + copied_slot * kStage, copied_stage, copied_o);
        if (++copied_stage == stages) {
          copied_stage = 0;
          copied_o += kColumns;
        }
      }
      ++copies;
      copied_slot = copied_slot + 1 == kStages ? 0 : copied_slot + 1;
      cp_async_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) copy_next();
    int slot = 0;
    for (int i = 0; i < units; ++i, o0 += kColumns) {
      clear();
      for (int stage = 0; stage < stages; ++stage) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the stage is there for all, and all have left the one before, which is filled again
        copy_next();
        if (stage == 0) {
          next = p.kept > 0 ? mine : own;
          load_fragment();
        }
        multiply_stage(stage, ring + slot * kStage);
        slot = slot + 1 == kStages ? 0 : slot + 1;
      }
      if (__any_sync(kFullMask, !finite())) sum_exactly(o0);
      finish(o0);
    }
    cp_async_wait<0>();
  }
};

}  // namespace moa
