// The counting sort of slots by expert id: one launch up to 8192 slots, else histograms per block and the scatter.
// The algorithm, and why it is stable: sort.cuh.
#include "routing/sort.cuh"

#include "routing/cuda.h"

namespace moa {
namespace {

using plan_cuda::kSortThreads;

// counts[bin][block] = slots of the block in the bin.
__global__ void __launch_bounds__(kSortThreads) histogram_kernel(const SortParams p, int32_t* counts) {
  MOA_DYNAMIC_SHARED(int32_t, bin_counts);
  next_may_begin();
  const int bins = static_cast<int>(p.experts) + 1, lane = threadIdx.x % kWarp;
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) bin_counts[bin] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * p.slots_per_block;
  const int64_t last = first + p.slots_per_block < p.slots ? first + p.slots_per_block : p.slots;
  for (int64_t begin = first + (threadIdx.x - lane); begin < last; begin += blockDim.x) {
    Step step = step_at(p, begin, last);
    step.match();
    if (step.leads()) atomicAdd(&bin_counts[step.bin], __popc(step.same));
  }
  __syncthreads();
  put_counts(bin_counts, bins, counts);
}

__global__ void __launch_bounds__(kSortThreads) scatter_kernel(const SortParams p) {
  MOA_DYNAMIC_SHARED(int32_t, rows);
  await_launch();
  sort_block<false>(p, blockIdx.x, rows);
}

}  // namespace

cudaError_t launch_scatter(const SortParams& p, int threads, cudaStream_t stream) {
  const size_t shared = plan_cuda::sort_shared(p.experts, p.warps);
  if (p.blocks > 1) return MOA_LAUNCH_EARLY(scatter_kernel, p.blocks, threads, shared, stream, p);
  return MOA_LAUNCH(scatter_kernel, p.blocks, threads, shared, stream, p);
}

cudaError_t launch_sort(const int64_t* indices, int64_t slots, int64_t experts, int32_t* offsets, int32_t* order,
                        int32_t* counts, cudaStream_t stream) {
  if (experts > kMaxExpertsCuda) return cudaErrorInvalidValue;
  const int64_t most = plan_cuda::sort_blocks(slots, experts);
  SortParams p{};
  p.indices = indices;
  p.slots = slots;
  p.experts = experts;
  p.slots_per_block = (slots + most - 1) / most;
  p.blocks = most == 1 ? 1 : static_cast<int>((slots + p.slots_per_block - 1) / p.slots_per_block);
  const int threads = plan_cuda::sort_threads(p.slots_per_block, experts);
  p.warps = plan_cuda::sort_warps(p.slots_per_block, experts, threads);
  p.counts = counts;
  p.offsets = offsets;
  p.order = order;
  if (p.blocks > 1) {
    const cudaError_t counted = MOA_LAUNCH(histogram_kernel, p.blocks, threads,
                                           static_cast<size_t>(experts + 1) * sizeof(int32_t), stream, p, counts);
    if (counted != cudaSuccess) return counted;
  }
  return launch_scatter(p, threads, stream);
}

size_t sort_work(int64_t slots, int64_t experts) {
  const int64_t blocks = plan_cuda::sort_blocks(slots, experts);
  return blocks > 1 ? static_cast<size_t>(blocks * (experts + 1)) * sizeof(int32_t) : 0;
}

cudaError_t sort_by_expert_cuda(const int64_t* indices, int64_t slots, int64_t experts, int32_t* offsets,
                                int32_t* order, void* work, cudaStream_t stream) {
  return launch_sort(indices, slots, experts, offsets, order, static_cast<int32_t*>(work), stream);
}

}  // namespace moa
