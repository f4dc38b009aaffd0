// The wide tile where steps are few (expand_wide.cuh): every step is multiplied for every row, with coefficients of zero
// where a row chose another expert.
//
// The coefficients of the first kHeld steps of experts stay in a warp's registers, those of the others in shared memory.
// All of the panel that a block needs, `units` times 64 columns, is brought to shared memory at once, so that behind two
// barriers each warp goes its own way: some store while others multiply.
#pragma once
#include "lora/expand_wide.cuh"

namespace moa {

template <class T, bool kByRows>
struct DenseTile : WideSums<T, kByRows, 4> {  // 32 columns at a time
  using Sums = WideSums<T, kByRows, 4>;
  using Sums::g, Sums::kColumns, Sums::kGroups, Sums::kThreads, Sums::lane, Sums::p, Sums::q, Sums::sum, Sums::warp;
  static constexpr int kHeld = plan_cuda::kDenseHeld, kStrip = 16 * kColumns;
  static_assert(kThreads == 256 && kGroups == 8 && kColumns == 64, "numbering below");

  const int holds, strips;     // steps held, of the kHeld that there is room for; strips of a unit
  T* const panel;              // [units][strips][kStrip]
  uint4* const more;           // [kept][2][32] of the warp
  uint32_t held[kHeld][2][4];  // what mma_m16n8k16 takes as a

  __device__ __forceinline__ DenseTile(const WideParams& p, unsigned char* shared)
      : Sums(p),
        holds(p.lora_steps < kHeld ? p.lora_steps : kHeld),
        strips(kHeld + p.kept),
        panel(reinterpret_cast<T*>(shared)),
        more(reinterpret_cast<uint4*>(panel + p.e.units * strips * kStrip) + warp * p.kept * 2 * kWarp + lane) {}

  // ---- the panel ----

  // A strip is one step by 64 columns: by rows [64 columns][16 ranks], else [16 ranks][64 columns], chunks of 16 bytes
  // exchanged so that neither copies nor ldmatrix meet a bank twice. By rows ldmatrix takes rows 8 i and 8 i + 1.
  static __device__ __forceinline__ int at(int row, int chunk) {
    if (!kByRows) return row * 64 + (chunk ^ row % 8) * 8;
    const int i = row / 8 % 4;
    return row / 4 * 64 + ((row % 4 * 2 + chunk) ^ (i % 2 + i / 2 * 4)) * 8;
  }

  // All strips of units `from` to `to` - 1, columns o0 on; half of the block has every second strip, a chunk a thread.
  // Held steps that there are not are zero.
  __device__ __forceinline__ void copy(int from, int to, int64_t o0) const {
    const int i = threadIdx.x % 128, row = kByRows ? i / 2 : i / 8, place = kByRows ? i % 2 : i % 8;
    const int64_t column = o0 + from * kColumns + (kByRows ? row : 8 * place);
#pragma unroll 1
    for (int s = threadIdx.x / 128; s < strips; s += 2) {
      const int id = s < holds ? s : s < kHeld ? -1 : holds + s - kHeld;
      const WideStep step = id < 0 ? WideStep{p.fragments, 0, 0} : this->step_of(id);
      const int ranks = kByRows ? step.ranks - 8 * place : step.ranks - row;  // from this chunk's on
      int64_t left = p.e.width - column, offset = kByRows ? 8 * place : row * p.e.panel_j;
      offset += column * p.e.panel_o;
      T* chunk = panel + (from * strips + s) * kStrip + at(row, place);
#pragma unroll 1
      for (int unit = from; unit < to; ++unit) {
        const int n = left <= 0 || ranks <= 0 ? 0 : kByRows ? ranks : static_cast<int>(left < 8 ? left : 8);
        if (p.whole_chunks) {
          cp_async_16(chunk, static_cast<const T*>(step.from) + (n > 0 ? offset : 0), n > 0);
        } else {
          this->stage(chunk, step, offset, n);
        }
        left -= kColumns;
        offset += kColumns * p.e.panel_o;
        chunk += strips * kStrip;
      }
    }
  }

  // ---- coefficients ----

  __device__ __forceinline__ void hold(const uint4* own) {
#pragma unroll
    for (int s = 0; s < kHeld; ++s)
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint4 v = s < holds ? own[(2 * s + m) * kWarp] : make_uint4(0, 0, 0, 0);
        held[s][m][0] = v.x;
        held[s][m][1] = v.y;
        held[s][m][2] = v.z;
        held[s][m][3] = v.w;
      }
  }

  // ---- sums ----

  // A step's, times columns 32 part .. 32 part + 31 of its strip.
  template <class M>
  __device__ __forceinline__ void multiply(const uint32_t (&c)[2][4], const T* strip, int part) {
    const int n = lane % 8, half = lane / 8 % 2, odd = lane / 16;  // ldmatrix: row, ranks from 8 on, second fragment
    uint32_t b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // columns of fragments 2 i and 2 i + 1, ranks 0 .. 7 and 8 .. 15
      if constexpr (kByRows) {
        ldmatrix_x4(b[i], strip + at(32 * part + 8 * (n / 2) + 4 * i + 2 * odd + n % 2, half));
      } else {
        ldmatrix_x4_trans(b[i], strip + at(8 * half + n, 4 * part + 2 * i + odd));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_m16n8k16<M>(sum[m][2 * i], c[m], {b[i][0], b[i][1]});
        mma_m16n8k16<M>(sum[m][2 * i + 1], c[m], {b[i][2], b[i][3]});
      }
  }

  __device__ __forceinline__ void multiply_all(const T* unit, int part) {
#pragma unroll
    for (int s = 0; s < kHeld; ++s) multiply<T>(held[s], unit + s * kStrip, part);
#pragma unroll 1
    for (int s = 0; s < p.kept; ++s) {
      const uint4 lo = more[2 * s * kWarp], hi = more[(2 * s + 1) * kWarp];
      const uint32_t c[2][4] = {{lo.x, lo.y, lo.z, lo.w}, {hi.x, hi.y, hi.z, hi.w}};
      const T* const strip = unit + (kHeld + s) * kStrip;
      if (!kByRows && !std::is_same<T, __nv_bfloat16>::value && holds + s >= p.lora_steps) {
        multiply<__nv_bfloat16>(c, strip, part);
      } else {
        multiply<T>(c, strip, part);
      }
    }
  }

  // ---- y ----

  __device__ __forceinline__ void finish(int64_t group, int64_t o0) const {
    const int64_t o = o0 + 8 * q;
    const int n = static_cast<int>(clamp(p.e.width - o, 0, 8));
    const uint4 bias = this->bias_at(o, n);
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const int64_t t = group * 32 + 8 * row + g;
      const bool there = t < p.e.tokens;
      uint32_t v[4];
      this->round_row(v, row, 0, bias, this->base_at(there ? t : -1, o, n));
      if (there) this->store(static_cast<T*>(p.e.y) + t * p.e.width + o, v, n, p.eights && n == 8);
    }
  }

  // Tile `tile` of rows, `units` times 64 columns from unit `unit` on.
  __device__ __forceinline__ void run(int64_t tile, int64_t unit, int units) {
    if (p.e.dz != nullptr) await_launch();  // the router's terms are from a launch in front, the adapters are not
    copy(0, 1, unit * kColumns);
    if (p.e.dz == nullptr) await_launch();
    const int64_t group = tile * kGroups + warp,
                  groups = (p.e.tokens + 31) / 32;  // those behind the last store nothing
    const uint4* const own = p.fragments + (group < groups ? group : 0) * p.fragments_each * 2 * kWarp;
    for (int i = 0; i < 2 * p.kept; ++i) cp_async_16(more + i * kWarp, own + (2 * holds + i) * kWarp + lane, true);
    cp_async_commit();
    copy(1, units, unit * kColumns);
    cp_async_commit();
    hold(own + lane);

    cp_async_wait<1>();
    __syncthreads();  // the first 64 columns are there
    const int64_t end = clamp(p.e.width, 0, (unit + units) * kColumns);
    const T* from = panel;
    int part = 0;
#pragma unroll 1
    for (int64_t o0 = unit * kColumns; o0 < end; o0 += 32, part ^= 1) {
      this->clear();
      multiply_all(from, part);
      if (__any_sync(kFullMask, !this->finite())) {
        this->sum_exactly(o0, own, p.steps, [](int) { return true; }, [&](int u) { return this->step_of(u); });
        hold(own + lane);  // its registers had other uses
      }
      finish(group, o0);
      if (part == 0) continue;
      if (from == panel) {
        cp_async_wait<0>();
        __syncthreads();  // the others
      }
      from += strips * kStrip;
    }
    cp_async_wait<0>();
  }
};

}  // namespace moa
