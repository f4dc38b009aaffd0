// Top-k selection of experts, gate weights, and the sort of the chosen slots.
//
//   S        = the k largest of z (of score + selection_bias where that is given); NaN counts as largest, ties go to
//              the lower id
//   softmax  w_e = exp(z_e) / sum over all E, or over S when renormalised;   sigmoid  w_e = s(z_e) [/ sum over S]
//
// A block owns consecutive tokens, so their slots are consecutive too, and it can count them for the sort (sort.cuh).
// If it is the only block it sorts them itself: one launch. A block passes over its tokens blockDim / L at a time; groups
// without a token work on the last one and write nothing, because shuffles need whole warps.
//
// Limits: E <= kMaxExpertsCuda, T k < 2^31.
#include "routing/cuda.h"
#include "routing/select.cuh"
#include "routing/sort.cuh"

namespace moa {
namespace {

using plan_cuda::kSortThreads;
using plan_cuda::Launches;

struct TopkLaunch {
  int64_t tokens_per_block;
  int32_t* counts;  // [experts + 1][gridDim.x] slots per bin, or null
  bool sorts;       // this block, the only one
  SortParams sort;
};

template <class A, int L, int V>
__global__ void __launch_bounds__(kSortThreads, 1) topk_kernel(const TopkParams p, const TopkLaunch l) {
  MOA_DYNAMIC_SHARED(int32_t, shared);
  next_may_begin();
  const int bins = static_cast<int>(p.experts) + 1;
  int32_t* const bin_counts = l.counts != nullptr ? shared : nullptr;
  if (bin_counts != nullptr) {
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) bin_counts[bin] = 0;
    __syncthreads();
  }
  const int64_t first = blockIdx.x * l.tokens_per_block;
  const int64_t last = first + l.tokens_per_block < p.tokens ? first + l.tokens_per_block : p.tokens;
  for (int64_t begin = first; begin < last; begin += blockDim.x / L) {
    const int64_t token = begin + threadIdx.x / L;
    route_token<A, L, V>(p, token < last ? token : last - 1, token < last, bin_counts);
  }
  if (l.counts == nullptr && !l.sorts) return;
  __syncthreads();
  if (l.sorts) {
    sort_block<true>(l.sort, 0, shared);
  } else {
    put_counts(bin_counts, bins, l.counts);
  }
}

cudaError_t launch_topk(const TopkParams& p, const TopkLaunch& l, int64_t blocks, int threads, size_t shared,
                        cudaStream_t stream) {
  const bool f64 = p.logits_type == DType::f64;
  const plan_cuda::Topk plan = plan_cuda::topk(p.experts, f64);
  const unsigned grid = static_cast<unsigned>(blocks);
  if (f64) return MOA_LAUNCH((topk_kernel<double, 32, 0>), grid, threads, shared, stream, p, l);
  if (plan.values == 0) return MOA_LAUNCH((topk_kernel<float, 32, 0>), grid, threads, shared, stream, p, l);
  if (plan.lanes == 2) return MOA_LAUNCH((topk_kernel<float, 2, 4>), grid, threads, shared, stream, p, l);
  if (plan.values == 4) return MOA_LAUNCH((topk_kernel<float, 8, 4>), grid, threads, shared, stream, p, l);
  if (plan.values == 8) return MOA_LAUNCH((topk_kernel<float, 8, 8>), grid, threads, shared, stream, p, l);
  if (plan.lanes == 8) return MOA_LAUNCH((topk_kernel<float, 8, 16>), grid, threads, shared, stream, p, l);
  return MOA_LAUNCH((topk_kernel<float, 32, 16>), grid, threads, shared, stream, p, l);
}

plan_cuda::Route route_of(const TopkParams& p, bool sorts = true) {
  return plan_cuda::route(p.tokens, p.top_k, p.experts, p.logits_type == DType::f64, sorts);
}

}  // namespace

size_t topk_work(const TopkParams& p) {
  const plan_cuda::Route route = route_of(p);
  if (route.launches == Launches::one) return 0;
  if (route.launches == Launches::apart) return sort_work(p.tokens * p.top_k, p.experts);
  return static_cast<size_t>(route.blocks * (p.experts + 1)) * sizeof(int32_t);
}

cudaError_t topk_cuda(const TopkParams& p, int32_t* offsets, int32_t* order, void* work, cudaStream_t stream) {
  if (p.experts > kMaxExpertsCuda) return cudaErrorInvalidValue;
  const bool sorts = offsets != nullptr;
  const plan_cuda::Route route = route_of(p, sorts);
  const int64_t slots = p.tokens * p.top_k;
  const bool one = route.launches == Launches::one, fused = route.launches == Launches::fused;
  SortParams sort{};
  sort.indices = p.indices;
  sort.slots = slots;
  sort.experts = p.experts;
  sort.slots_per_block = route.tokens_per_block * p.top_k;
  sort.blocks = static_cast<int>(route.blocks);
  const int threads = one ? route.threads : plan_cuda::sort_threads(sort.slots_per_block, p.experts);
  sort.warps = plan_cuda::sort_warps(sort.slots_per_block, p.experts, threads);
  sort.counts = static_cast<int32_t*>(work);
  sort.offsets = offsets;
  sort.order = order;

  TopkLaunch l{};
  l.tokens_per_block = route.tokens_per_block;
  l.counts = fused ? static_cast<int32_t*>(work) : nullptr;
  l.sorts = one;
  l.sort = sort;
  const size_t shared = one     ? plan_cuda::sort_shared(p.experts, sort.warps)
                        : fused ? static_cast<size_t>(p.experts + 1) * sizeof(int32_t)
                                : 0;
  const cudaError_t selected = launch_topk(p, l, route.blocks, route.threads, shared, stream);
  if (selected != cudaSuccess || one || !sorts) return selected;
  if (fused) return launch_scatter(sort, threads, stream);
  return launch_sort(p.indices, slots, p.experts, offsets, order, static_cast<int32_t*>(work), stream);
}

}  // namespace moa
