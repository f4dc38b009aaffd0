// Routing operators on CUDA: the checks of the CPU's (arguments.h), and the kernels. What ids and order hold is not
// looked at here: the kernels take no address from them that they have not checked (routing/cuda.h).
#ifdef MOA_WITH_CUDA
#include "lora/cuda.h"
#include "torch/arguments.h"
#include "torch/checks.h"
#include "torch/cuda_ops.h"

namespace moa {

Tensors4 topk_routing_cuda(const Tensor& logits, int64_t top_k, int64_t score_func, bool norm_topk_prob,
                           const OptionalTensor& selection_bias, const OptionalTensor& mask) {
  CudaCall call(place_of(logits));
  const TopkArguments a(logits, top_k, score_func, norm_topk_prob, selection_bias, mask);
  check_experts(a.p.experts);
  MOA_CUDA_CHECK(
      topk_cuda(a.p, data<int32_t>(a.offsets), data<int32_t>(a.order), call.work(topk_work(a.p)), call.stream()));
  return a.outputs();
}

Tensors5 linear_routing_cuda(const Tensor& x, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                             bool norm_topk_prob, const OptionalTensor& selection_bias, const OptionalTensor& mask) {
  CudaCall call(place_of(x));
  const RouterArguments a(x, router_weight);
  check_topk(a.p.tokens, a.p.experts, top_k);
  MOA_CUDA_CHECK(router_cuda(a.p, call.work(router_work(a.p)), call.stream()));
  auto [weights, indices, offsets, order] =
      topk_routing_cuda(a.logits, top_k, score_func, norm_topk_prob, selection_bias, mask);
  return {a.logits, weights, indices, offsets, order};
}

Tensor topk_routing_backward_cuda(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices,
                                  int64_t score_func, bool norm_topk_prob) {
  const CudaCall call(place_of(logits));
  const TopkBackwardArguments a(grad_weights, logits, indices, score_func, norm_topk_prob);
  MOA_CUDA_CHECK(topk_backward_cuda(a.p, call.stream()));
  return a.grad_logits;
}

Tensors2 sort_by_expert_cuda(const Tensor& indices, int64_t num_experts) {
  CudaCall call(place_of(indices));
  const SortArguments a(indices, num_experts);
  check_experts(num_experts);
  MOA_CUDA_CHECK(sort_by_expert_cuda(data<int64_t>(a.indices), a.slots, num_experts, data<int32_t>(a.offsets),
                                     data<int32_t>(a.order), call.work(sort_work(a.slots, num_experts)),
                                     call.stream()));
  return {a.offsets, a.order};
}

}  // namespace moa

STABLE_TORCH_LIBRARY_IMPL(moa_ops, CUDA, m) {
  m.impl("topk_routing", TORCH_BOX(&moa::topk_routing_cuda));
  m.impl("linear_routing", TORCH_BOX(&moa::linear_routing_cuda));
  m.impl("topk_routing_backward", TORCH_BOX(&moa::topk_routing_backward_cuda));
  m.impl("sort_by_expert",
         TORCH_BOX(static_cast<moa::Tensors2 (*)(const moa::Tensor&, int64_t)>(&moa::sort_by_expert_cuda)));
}
#endif
