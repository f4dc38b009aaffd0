// The operators' CUDA implementations, as csrc/torch/cuda_*.cpp register them: those of torch/ops.h.
#pragma once
#include "routing/cuda.h"
#include "torch/cuda_call.h"
#include "torch/ops.h"

namespace moa {

inline void check_experts(int64_t experts) {
  STD_TORCH_CHECK(experts <= kMaxExpertsCuda, experts, " experts; the CUDA kernels take up to ", kMaxExpertsCuda);
}

Tensors4 topk_routing_cuda(const Tensor& logits, int64_t top_k, int64_t score_func, bool norm_topk_prob,
                           const OptionalTensor& selection_bias, const OptionalTensor& mask);
Tensor topk_routing_backward_cuda(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices,
                                  int64_t score_func, bool norm_topk_prob);
Tensors5 linear_routing_cuda(const Tensor& x, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                             bool norm_topk_prob, const OptionalTensor& selection_bias, const OptionalTensor& mask);
Tensors2 sort_by_expert_cuda(const Tensor& indices, int64_t num_experts);

}  // namespace moa
