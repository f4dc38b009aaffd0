// Stable counting sort of slots by expert id, by thread blocks that each own a run of consecutive slots.
//
//   offsets[e] = number of slots with an id in [0, e);  order = slots by (id, slot), those of -1 last
//
// Bins are 0 .. experts, the last one for -1 and whatever else is no expert. Within a block each walking warp owns a
// consecutive part of the run, and a row of bins in shared memory. The warps count; then row w of bin e is made to
// say how many of its slots earlier warps have, and the bin where it begins: slots of lower bins, plus those of e in
// earlier blocks. Walking again, a slot's place is the sum of both plus the number of lower lanes with the same bin.
// Blocks, warps, steps of a warp and lanes all ascend with the slots, so equal ids keep their order: stable, and no
// placement depends on which thread comes first.
//
// Included by sort.cu, topk.cu and routed.cu. Limits: experts <= kMaxExpertsCuda, slots < 2^31.
#pragma once
#include "common/device.cuh"
#include "routing/plan_cuda.h"

namespace moa {

struct SortParams {
  const int64_t* indices;  // [slots]
  int64_t slots, experts;
  int64_t slots_per_block;
  int warps;  // that walk; each block needs at least as many
  int blocks;
  const int32_t* counts;  // [experts + 1, blocks] slots per bin and block; unused where there is one block
  int32_t* offsets;       // [experts + 1]
  int32_t* order;         // [slots]
};

__device__ __forceinline__ int bin_of(int64_t id, int64_t experts) {
  return static_cast<int>(id >= 0 && id < experts ? id : experts);
}

// What a lane has of a step of its warp: 32 slots. Lanes without a slot have bin -1.
struct Step {
  int bin;
  unsigned same;  // lanes of the warp with the same bin

  __device__ __forceinline__ void match() { same = __match_any_sync(kFullMask, bin); }
  __device__ __forceinline__ bool leads() const {
    return bin >= 0 && static_cast<int>(threadIdx.x % kWarp) == __ffs(static_cast<int>(same)) - 1;
  }
};
__device__ __forceinline__ Step step_at(const SortParams& p, int64_t first, int64_t end) {
  const int64_t slot = first + threadIdx.x % kWarp;
  return {slot < end ? bin_of(p.indices[slot], p.experts) : -1, 0};
}

// visit(first slot, step) for the steps of a warp; first_step: its first one, matched.
template <class Visit>
__device__ __forceinline__ void walk(const SortParams& p, int64_t begin, int64_t end, const Step& first_step,
                                     const Visit& visit) {
  Step step = first_step;
  for (int64_t first = begin; first < end; first += kWarp) {
    Step next{-1, 0};
    const bool more = first + kWarp < end;
    if (more) next = step_at(p, first + kWarp, end);  // under way while this one is visited
    visit(first, step);
    if (more) next.match();
    step = next;
  }
}

// This block's counts, for the scatter.
__device__ __forceinline__ void put_counts(const int32_t* bin_counts, int bins, int32_t* counts) {
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x)
    counts[static_cast<int64_t>(bin) * gridDim.x + blockIdx.x] = bin_counts[bin];
}

// start[bin] = slots of the bin, before[bin] = those of earlier blocks. A warp has kBatch bins at a time, whose counts
// are all under way together.
__device__ __forceinline__ void add_counts(const SortParams& p, int block, int bins, int32_t* start, int32_t* before) {
  constexpr int kBatch = 5;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int first = warp; first < bins; first += kBatch * warps) {
    int32_t all[kBatch] = {}, earlier[kBatch] = {};
#pragma unroll 4
    for (int b = lane; b < p.blocks; b += kWarp) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int bin = first + i * warps;
        const int32_t n = bin < bins ? p.counts[static_cast<int64_t>(bin) * p.blocks + b] : 0;
        all[i] += n;
        earlier[i] += b < block ? n : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int bin = first + i * warps;
      const int32_t in_all = warp_sum(all[i]), in_earlier = warp_sum(earlier[i]);
      if (lane == 0 && bin < bins) {
        start[bin] = in_all;
        before[bin] = in_earlier;
      }
    }
  }
}

// Sorts the slots of block `block`, by all threads of a thread block; kAlone: there is one block, and no counts.
// `shared`: plan_cuda::sort_shared bytes.
template <bool kAlone>
__device__ __forceinline__ void sort_block(const SortParams& p, int block, int32_t* shared) {
  MOA_SHARED(int32_t, sums, kWarp);
  const int bins = static_cast<int>(p.experts) + 1, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t* const start = shared + p.warps * bins;  // slots of a bin; then where this block's begin
  int32_t* const before = start + bins;            // slots of the bin in earlier blocks

  const int64_t first = block * p.slots_per_block;
  const int64_t last = first + p.slots_per_block < p.slots ? first + p.slots_per_block : p.slots;
  const int64_t each = ((last - first + p.warps - 1) / p.warps + kWarp - 1) / kWarp * kWarp;
  const int64_t begin = first + warp * each, end = begin + each < last ? begin + each : last;
  int32_t* const row = shared + warp * bins;
  const bool walks = warp < p.warps;
  Step first_step = walks ? step_at(p, begin, end) : Step{-1, 0};
  if constexpr (!kAlone)
    if (p.blocks > 1) add_counts(p, block, bins, start, before);
  first_step.match();
  if (walks) {
    for (int bin = lane; bin < bins; bin += kWarp) row[bin] = 0;
    __syncwarp();
    walk(p, begin, end, first_step, [&](int64_t, const Step& step) {
      if (step.leads()) row[step.bin] += __popc(step.same);
      __syncwarp();
    });
  }
  __syncthreads();

  // A thread has a bin: its slots in earlier warps, and where the bin begins, by a scan over the bins.
  int32_t carry = 0;
  for (int from = 0; from < bins; from += blockDim.x) {
    const int bin = from + threadIdx.x;
    int32_t own = 0;
    if (bin < bins) {
      for (int w0 = 0; w0 < p.warps; w0 += 8) {
        int32_t n[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) n[i] = w0 + i < p.warps ? shared[(w0 + i) * bins + bin] : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (w0 + i < p.warps) shared[(w0 + i) * bins + bin] = own;
          own += n[i];
        }
      }
      if (!kAlone && p.blocks > 1) own = start[bin];
    }
    int32_t upto = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t below = __shfl_up_sync(kFullMask, upto, step);
      if (lane >= step) upto += below;
    }
    if (lane == kWarp - 1) sums[warp] = upto;
    __syncthreads();
    const int32_t sum = lane < static_cast<int>(blockDim.x / kWarp) ? sums[lane] : 0;
    const int32_t begins = carry + warp_sum(lane < warp ? sum : 0) + upto - own;
    carry += warp_sum(sum);
    if (bin < bins) {
      if (block == 0) p.offsets[bin] = begins;
      start[bin] = begins + (!kAlone && p.blocks > 1 ? before[bin] : 0);
    }
    __syncthreads();
  }

  if (walks)
    walk(p, begin, end, first_step, [&](int64_t slot, const Step& step) {
      if (step.bin >= 0)
        p.order[start[step.bin] + row[step.bin] + __popc(step.same & ((1u << lane) - 1u))] =
            static_cast<int32_t>(slot + lane);
      __syncwarp();
      if (step.leads()) row[step.bin] += __popc(step.same);
      __syncwarp();
    });
}

// The scatter; of several blocks it is the launch behind the one that counts. In sort.cu.
cudaError_t launch_scatter(const SortParams& p, int threads, cudaStream_t stream);
// Histograms and scatter over plan_cuda::sort_blocks; `counts` has room for their rows.
cudaError_t launch_sort(const int64_t* indices, int64_t slots, int64_t experts, int32_t* offsets, int32_t* order,
                        int32_t* counts, cudaStream_t stream);

}  // namespace moa
