// The wide tile where steps are many (expand_wide.cuh): 64 columns of y at a time.
//
// A warp's fragments are those of the steps that one of its rows takes part in, in ascending order; the first `kept` stay
// in shared memory from column to column. The panel's strips of 64 columns come to shared memory by asynchronous copies
// for the whole block, eight steps a stage: those that one of the eight groups takes part in. A warp skips what is not
// its own.
#pragma once
#include "lora/expand_wide.cuh"

namespace moa {

template <class T, bool kByRows>
struct ListedTile : WideSums<T, kByRows, plan_cuda::kWideColumns / 8> {
  static constexpr int kFrags = plan_cuda::kWideColumns / 8;
  using Sums = WideSums<T, kByRows, kFrags>;
  using Sums::g, Sums::kColumns, Sums::kGroups, Sums::kThreads, Sums::lane, Sums::p, Sums::q, Sums::sum, Sums::warp;
  static constexpr int kSteps = plan_cuda::kWideSteps, kStages = plan_cuda::kWideStages,
                       kStage = kSteps * 16 * kColumns;
  static_assert(kThreads == 256 && kGroups == 8 && kColumns == 64 && kSteps == 8, "numbering below");

  T* const ring;         // [kStages][kStage]
  uint4* const mine;     // [kept][2][32] of the warp: its first fragments
  WideStep* const step;  // [entries]
  uint32_t* const part;  // [entries / 4] four steps of each group: bit 4 group + step % 4
  int* const counts;     // [kGroups]
  int* const token;      // [32] of the warp's rows; or -1
  int steps, lora;       // of the tile, and those before the router's
  const uint4* own;
  const uint4* next;  // of the fragments, in shared or global memory
  uint4 ahead[2];     // the one before it

  __device__ __forceinline__ ListedTile(const WideParams& p, unsigned char* shared)
      : Sums(p),
        ring(reinterpret_cast<T*>(shared)),
        mine(reinterpret_cast<uint4*>(ring + kStages * kStage) + warp * p.kept * 2 * kWarp + lane),
        step(reinterpret_cast<WideStep*>(reinterpret_cast<uint4*>(ring + kStages * kStage) +
                                         kGroups * p.kept * 2 * kWarp)),
        part(reinterpret_cast<uint32_t*>(step + p.entries)),
        counts(reinterpret_cast<int*>(part + p.entries / 4)),
        token(counts + kGroups + warp * 32) {}

  // ---- the tile's steps ----

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
        step[at] = this->step_of(id);
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
    const int columns = static_cast<int>(clamp(p.e.width - o0, 0, kColumns));
    const int i = threadIdx.x % 128, second = threadIdx.x / 128;
    // by rows: column and half of the ranks; else rank and eight columns
    const int row = kByRows ? i / 2 : i / 8, place = kByRows ? i % 2 : i % 8;
    const int64_t offset = kByRows ? (o0 + row) * p.e.panel_o + 8 * place : row * p.e.panel_j + o0 + 8 * place;
    const WideStep* const from = step + kSteps * stage + second;
    const int left = steps - kSteps * stage - second;
    const auto here = [&](int s) {
      return to + s / 4 * (kStage / 2) + (kByRows ? at(row, s % 4 * 2 + place) : at(s % 4 * 16 + row, place));
    };
    if (p.whole_chunks) {
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {
        if (s >= left) continue;
        const WideStep f = from[s];
        const bool there = kByRows ? row < columns && 8 * place < f.ranks : row < f.ranks && 8 * place < columns;
        cp_async_16(here(s + second), static_cast<const T*>(f.from) + (there ? offset : 0), there);
      }
      return;
    }
#pragma unroll 1
    for (int s = 0; s < kSteps && s < left; s += 2) {
      const WideStep f = from[s];
      const int n = kByRows ? (row < columns ? f.ranks - 8 * place : 0) : (row < f.ranks ? columns - 8 * place : 0);
      this->stage(here(s + second), f, offset, n);
    }
  }

  // ---- sums ----

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

  // ---- y ----

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
      if (t >= 0) this->store(static_cast<T*>(p.e.y) + t * p.e.width + o, w, n, p.eights && n == 8);
    }
  }

  __device__ __forceinline__ void finish(int64_t o0) const {
    int n[2];
    uint4 bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      n[i] = static_cast<int>(clamp(p.e.width - o0 - 32 * i - 8 * q, 0, 8));
      bias[i] = this->bias_at(o0 + 32 * i + 8 * q, n[i]);
    }
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const int64_t t = token[8 * row + g];
      uint4 base[2];
      uint32_t v[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) base[i] = this->base_at(t, o0 + 32 * i + 8 * q, n[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) this->round_row(v[i], row, i, bias[i], base[i]);
      store_rows(row, v, o0);
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
      this->clear();
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
      if (__any_sync(kFullMask, !this->finite())) {
        this->sum_exactly(
            o0, own - lane, steps, [&](int u) { return (part[u / 4] >> (4 * warp + u % 4) & 1u) != 0; },
            [&](int u) { return step[u]; });
      }
      finish(o0);
    }
    cp_async_wait<0>();
  }
};

}  // namespace moa
