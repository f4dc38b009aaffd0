// The operators' CPU implementations, as csrc/torch/ops.cpp registers them. Schemas and meanings: there.
#pragma once
#include <tuple>

#include "torch/tensors.h"

namespace moa {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors4 topk_routing_cpu(const Tensor& logits, int64_t top_k, int64_t score_func, bool norm_topk_prob,
                          const OptionalTensor& selection_bias, const OptionalTensor& mask);
Tensor topk_routing_backward_cpu(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices,
                                 int64_t score_func, bool norm_topk_prob);
Tensors2 sort_by_expert_cpu(const Tensor& indices, int64_t num_experts);
Tensors5 linear_routing_cpu(const Tensor& x, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                            bool norm_topk_prob, const OptionalTensor& selection_bias, const OptionalTensor& mask);

Tensors2 segment_lora_cpu(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
                          const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
                          double scaling, const OptionalTensor& ranks, const OptionalTensor& base,
                          const OptionalTensor& bias, const OptionalTensor& weight);
Tensors7 routed_lora_cpu(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& router_weight,
                         int64_t top_k, int64_t score_func, bool norm_topk_prob, double scaling,
                         const OptionalTensor& bias, const OptionalTensor& weight);
Tensor segment_linear_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& base, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
                          const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
                          double scaling, const OptionalTensor& ranks);
Tensor routed_linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                         bool norm_topk_prob, double scaling);
bool own_linear_cpu(const Tensor& x, const Tensor& weight);
Tensors5 segment_lora_backward_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                                   const Tensor& weights, const Tensor& indices, const Tensor& expert_offsets,
                                   const Tensor& order, const Tensor& h, const OptionalTensor& expert_scaling,
                                   double scaling, const OptionalTensor& ranks, const OptionalTensor& router_weight,
                                   const OptionalTensor& logits, int64_t score_func, bool norm_topk_prob, bool need_x,
                                   bool need_A, bool need_B, bool need_weights, bool need_router,
                                   const OptionalTensor& weight);

}  // namespace moa
