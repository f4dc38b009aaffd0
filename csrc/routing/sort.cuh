// Stable counting sort of slots by expert id, by thread blocks that each own a run of consecutive slots.
//
//   offsets[e] = number of slots with an id in [0, e);  order = slots by (id, slot), those of -1 last
//
// Bins are 0 .. experts, the last one for -1 and whatever else is no expert. Within a block each walking warp owns a
// consecutive part of the run, and a row of bins in shared memory. The warps count; then row w of bin e is made to
// say where the first of its slots belongs: slots of lower bins, plus those of e in earlier blocks, plus those in
// earlier warps. Walking again, a slot's place is its row's entry plus the number of lower lanes with the same bin.
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
  int warps;              // that walk; each block needs at least as many
  int blocks;             // rows of counts
  const int32_t* counts;  // [blocks, experts + 1] slots per block and bin; unused where there is one block
  int32_t* offsets;       // [experts + 1]
  int32_t* order;         // [slots]
};

__device__ __forceinline__ int bin_of(int64_t id, int64_t experts) {
  return static_cast<int>(id >= 0 && id < experts ? id : experts);
}

// visit(slot, bin, mask of the warp's lanes with the same bin) for the slots of one warp; lanes without a slot are
// called too, with bin -1, so that visit may hold barriers.
template <class Visit>
__device__ __forceinline__ void walk(const SortParams& p, int64_t begin, int64_t end, const Visit& visit) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t slot = first + lane;
    const int bin = slot < end ? bin_of(p.indices[slot], p.experts) : -1;
    visit(slot, bin, __match_any_sync(kFullMask, bin));
  }
}

// data[i] = sum of data[0 .. i), for the whole block; `sums` has a place per warp.
__device__ __forceinline__ void exclusive_scan(int32_t* data, int n, int32_t* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int32_t carry = 0;
  for (int first = 0; first < n; first += blockDim.x) {
    const int i = first + threadIdx.x;
    const int32_t own = i < n ? data[i] : 0;
    int32_t upto = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t below = __shfl_up_sync(kFullMask, upto, step);
      if (lane >= step) upto += below;
    }
    if (lane == kWarp - 1) sums[warp] = upto;
    __syncthreads();
    int32_t before = carry;
    for (int w = 0; w < warps; ++w) {
      const int32_t sum = sums[w];
      if (w < warp) before += sum;
      carry += sum;
    }
    if (i < n) data[i] = before + upto - own;
    __syncthreads();
  }
}

// Sorts the slots of block `block`, by all threads of a thread block. `shared`: plan_cuda::sort_shared bytes.
__device__ __forceinline__ void sort_block(const SortParams& p, int block, int32_t* shared) {
  MOA_SHARED(int32_t, sums, kWarp);
  const int bins = static_cast<int>(p.experts) + 1, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t* const start = shared + p.warps * bins;  // where a bin begins; before the scan, how many slots it has
  int32_t* const before = start + bins;            // slots of the bin in earlier blocks
  for (int i = threadIdx.x; i < (p.warps + 2) * bins; i += blockDim.x) shared[i] = 0;
  __syncthreads();

  const int64_t first = block * p.slots_per_block;
  const int64_t last = first + p.slots_per_block < p.slots ? first + p.slots_per_block : p.slots;
  const int64_t each = ((last - first + p.warps - 1) / p.warps + kWarp - 1) / kWarp * kWarp;
  const int64_t begin = first + warp * each, end = begin + each < last ? begin + each : last;
  int32_t* const row = shared + warp * bins;
  const bool walks = warp < p.warps;
  if (walks)
    walk(p, begin, end, [&](int64_t, int bin, unsigned same) {
      if (bin >= 0 && lane == __ffs(same) - 1) row[bin] += __popc(same);
      __syncwarp();
    });
  if (p.blocks > 1) {
    for (int bin = lane; bin < bins; bin += kWarp) {
      int32_t all = 0, earlier = 0;
      for (int b = warp; b < p.blocks; b += blockDim.x / kWarp) {
        const int32_t n = p.counts[static_cast<int64_t>(b) * bins + bin];
        all += n;
        if (b < block) earlier += n;
      }
      atomicAdd(&start[bin], all);  // integers: the order of the sum does not show
      atomicAdd(&before[bin], earlier);
    }
  }
  __syncthreads();
  if (p.blocks == 1)
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      int32_t all = 0;
      for (int w = 0; w < p.warps; ++w) all += shared[w * bins + bin];
      start[bin] = all;
    }
  __syncthreads();
  exclusive_scan(start, bins, sums);

  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    if (block == 0) p.offsets[bin] = start[bin];
    int32_t at = start[bin] + before[bin];
    for (int w = 0; w < p.warps; ++w) {
      const int32_t n = shared[w * bins + bin];
      shared[w * bins + bin] = at;
      at += n;
    }
  }
  __syncthreads();
  if (walks)
    walk(p, begin, end, [&](int64_t slot, int bin, unsigned same) {
      if (bin >= 0) p.order[row[bin] + __popc(same & ((1u << lane) - 1u))] = static_cast<int32_t>(slot);
      __syncwarp();
      if (bin >= 0 && lane == __ffs(same) - 1) row[bin] += __popc(same);
      __syncwarp();
    });
}

// The scatter, once counts are known; in sort.cu.
cudaError_t launch_scatter(const SortParams& p, cudaStream_t stream);
// Histograms and scatter over plan_cuda::sort_blocks; `counts` has room for their rows.
cudaError_t launch_sort(const int64_t* indices, int64_t slots, int64_t experts, int32_t* offsets, int32_t* order,
                        int32_t* counts, cudaStream_t stream);

}  // namespace moa
