// Routing operators on the CPU: what only the CPU checks, and the kernels.
#include "routing/routing.h"

#include "isa/table.h"
#include "torch/arguments.h"

namespace moa {

Tensors4 topk_routing_cpu(const Tensor& logits, int64_t top_k, int64_t score_func, bool norm_topk_prob,
                          const OptionalTensor& selection_bias, const OptionalTensor& mask) {
  const TopkArguments a(logits, top_k, score_func, norm_topk_prob, selection_bias, mask);
  kernels().topk(a.p);
  sort_by_expert(a.p.indices, a.p.tokens * a.p.top_k, a.p.experts, data<int32_t>(a.offsets), data<int32_t>(a.order));
  return a.outputs();
}

Tensors5 linear_routing_cpu(const Tensor& x, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                            bool norm_topk_prob, const OptionalTensor& selection_bias, const OptionalTensor& mask) {
  const RouterArguments a(x, router_weight);
  kernels().router(a.p);
  auto [weights, indices, offsets, order] =
      topk_routing_cpu(a.logits, top_k, score_func, norm_topk_prob, selection_bias, mask);
  return {a.logits, weights, indices, offsets, order};
}

Tensor topk_routing_backward_cpu(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices,
                                 int64_t score_func, bool norm_topk_prob) {
  const TopkBackwardArguments a(grad_weights, logits, indices, score_func, norm_topk_prob);
  const TopkBackwardParams& p = a.p;
  for (int64_t i = 0; i < p.tokens * p.top_k; ++i)
    STD_TORCH_CHECK(
        p.indices[i] >= -1 && p.indices[i] < p.experts && (p.indices[i] < 0) == (p.indices[i / p.top_k * p.top_k] < 0),
        "indices[", i / p.top_k, ", ", i % p.top_k, "] is ", p.indices[i], "; allowed are 0 to ", p.experts - 1,
        ", or -1 in a whole row");
  kernels().topk_backward(p);
  return a.grad_logits;
}

Tensors2 sort_by_expert_cpu(const Tensor& indices, int64_t num_experts) {
  const SortArguments a(indices, num_experts);
  const int64_t* ids = data<int64_t>(a.indices);
  if (!sort_by_expert(ids, a.slots, num_experts, data<int32_t>(a.offsets), data<int32_t>(a.order))) {
    for (int64_t i = 0; i < a.slots; ++i)
      STD_TORCH_CHECK(ids[i] >= -1 && ids[i] < num_experts, "expert id ", ids[i], " at position ", i,
                      " is out of range; allowed are 0 to ", num_experts - 1, ", and -1 for no adapter");
  }
  return {a.offsets, a.order};
}

}  // namespace moa
