// Routing on the GPU: the same parameters and results as on the CPU (routing/routing.h), all pointers on the device.
//
// Nothing is read on the host and nothing waits: every call only puts kernels on the stream, so that a CUDA graph can
// hold it. What comes from outside and serves as an address is checked where it is used: an id outside [0, experts)
// counts as -1. `work` is memory of at least the size that the function beside it names, contents undefined.
#pragma once
#include "common/cuda_api.h"
#include "routing/routing.h"

namespace moa {

constexpr int64_t kMaxExpertsCuda = 8192;  // a row of bins must fit into shared memory: plan_cuda.h

// Weights and ids of p, and their sort: offsets [experts + 1], order [tokens * top_k]. One launch while there are few
// slots, two or three beyond. Without offsets the sort is left out, and needs neither order nor work.
size_t topk_work(const TopkParams& p);
cudaError_t topk_cuda(const TopkParams& p, int32_t* offsets, int32_t* order, void* work, cudaStream_t stream);

// The sort alone.
size_t sort_work(int64_t slots, int64_t experts);
cudaError_t sort_by_expert_cuda(const int64_t* indices, int64_t slots, int64_t experts, int32_t* offsets,
                                int32_t* order, void* work, cudaStream_t stream);

// Gradient of every logit, [tokens, experts] in logits_type.
cudaError_t topk_backward_cuda(const TopkBackwardParams& p, cudaStream_t stream);
// Gradient of the selected logits alone (for softmax over the selected, and for the sigmoid, there is no other), in
// sorted order: grad_logits is [tokens * top_k] in the weights' type, entry q belongs to slot order[q].
cudaError_t topk_backward_sorted_cuda(const TopkBackwardParams& p, const int32_t* order, cudaStream_t stream);

}  // namespace moa
