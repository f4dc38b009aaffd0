// Routing operators on the CPU: checks, allocation, kernel.
#include "routing/routing.h"

#include "isa/table.h"
#include "torch/checks.h"
#include "torch/ops.h"

namespace moa {

static Tensors4 topk_and_sort(const Tensor& logits, int64_t top_k, int64_t score_func, bool norm_topk_prob,
                              const OptionalTensor& selection_bias, const OptionalTensor& mask) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_topk(tokens, experts, top_k);
  TopkParams p{};
  p.logits_type = dtype_of(logits, "logits");
  const ScalarType acc = acc_type(p.logits_type);
  const Tensor z = with_dense_rows(logits);
  OptionalTensor bias, rows;
  if (selection_bias.has_value()) {
    check_tensor(*selection_bias, "selection_bias", {experts}, acc);
    bias = dense(*selection_bias);
  }
  if (mask.has_value()) {
    check_tensor(*mask, "mask", {tokens}, ScalarType::Bool);
    rows = dense(*mask);
  }
  Tensor weights = empty_cpu({tokens, top_k}, acc), indices = empty_cpu({tokens, top_k}, ScalarType::Long);
  Tensor offsets = empty_cpu({experts + 1}, ScalarType::Int), order = empty_cpu({tokens * top_k}, ScalarType::Int);
  p.tokens = tokens;
  p.experts = experts;
  p.top_k = top_k;
  p.logits = data<void>(z);
  p.ldz = row_stride(z);
  p.score_func = score_func_of(score_func);
  p.norm_topk_prob = norm_topk_prob;
  p.selection_bias = bias.has_value() ? data<void>(*bias) : nullptr;
  p.mask = rows.has_value() ? data<bool>(*rows) : nullptr;
  p.weights = data<void>(weights);
  p.indices = data<int64_t>(indices);
  kernels().topk(p);
  sort_by_expert(p.indices, tokens * top_k, experts, data<int32_t>(offsets), data<int32_t>(order));
  return {weights, indices, offsets, order};
}

Tensors4 topk_routing_cpu(const Tensor& logits, int64_t top_k, int64_t score_func, bool norm_topk_prob,
                          const OptionalTensor& selection_bias, const OptionalTensor& mask) {
  check_tensor(logits, "logits", {-1, -1});
  return topk_and_sort(logits, top_k, score_func, norm_topk_prob, selection_bias, mask);
}

Tensors5 linear_routing_cpu(const Tensor& x, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                            bool norm_topk_prob, const OptionalTensor& selection_bias, const OptionalTensor& mask) {
  check_tensor(x, "x", {-1, -1});
  RouterParams p{};
  p.x_type = dtype_of(x, "x");
  check_tensor(router_weight, "router_weight", {-1, x.size(1)}, acc_type(p.x_type));
  const Tensor rows = with_dense_rows(x), weight = dense(router_weight);
  p.tokens = x.size(0);
  p.in = x.size(1);
  p.experts = weight.size(0);
  p.x = data<void>(rows);
  p.ldx = row_stride(rows);
  p.weight = data<void>(weight);
  Tensor logits = empty_cpu({p.tokens, p.experts}, acc_type(p.x_type));
  p.logits = data<void>(logits);
  kernels().router(p);
  auto [weights, indices, offsets, order] =
      topk_and_sort(logits, top_k, score_func, norm_topk_prob, selection_bias, mask);
  return {logits, weights, indices, offsets, order};
}

Tensor topk_routing_backward_cpu(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices,
                                 int64_t score_func, bool norm_topk_prob) {
  check_tensor(logits, "logits", {-1, -1});
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_tensor(indices, "indices", {tokens, -1}, ScalarType::Long);
  TopkBackwardParams p{};
  p.logits_type = dtype_of(logits, "logits");
  p.top_k = indices.size(1);
  check_tensor(grad_weights, "grad_weights", {tokens, p.top_k}, acc_type(p.logits_type));
  const Tensor z = with_dense_rows(logits), ids = dense(indices), grad = dense(grad_weights);
  p.indices = data<int64_t>(ids);
  for (int64_t i = 0; i < tokens * p.top_k; ++i)
    STD_TORCH_CHECK(
        p.indices[i] >= -1 && p.indices[i] < experts && (p.indices[i] < 0) == (p.indices[i / p.top_k * p.top_k] < 0),
        "indices[", i / p.top_k, ", ", i % p.top_k, "] is ", p.indices[i], "; allowed are 0 to ", experts - 1,
        ", or -1 in a whole row");
  p.tokens = tokens;
  p.experts = experts;
  p.logits = data<void>(z);
  p.ldz = row_stride(z);
  p.score_func = score_func_of(score_func);
  p.norm_topk_prob = norm_topk_prob;
  p.grad_weights = data<void>(grad);
  Tensor out = empty_cpu({tokens, experts}, logits.scalar_type());
  p.grad_logits = data<void>(out);
  kernels().topk_backward(p);
  return out;
}

Tensors2 sort_by_expert_cpu(const Tensor& indices, int64_t num_experts) {
  STD_TORCH_CHECK(indices.is_cpu() && indices.scalar_type() == ScalarType::Long, "indices is ",
                  name_of(indices.scalar_type()), ", expected int64 on the CPU");
  STD_TORCH_CHECK(num_experts >= 1, "num_experts is ", num_experts, "; allowed are 1 and more");
  const Tensor ids = dense(indices);
  const int64_t slots = ids.numel();
  check_slots(slots, 1, num_experts);
  Tensor offsets = empty_cpu({num_experts + 1}, ScalarType::Int), order = empty_cpu({slots}, ScalarType::Int);
  if (!sort_by_expert(data<int64_t>(ids), slots, num_experts, data<int32_t>(offsets), data<int32_t>(order))) {
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t id = data<int64_t>(ids)[i];
      STD_TORCH_CHECK(id >= -1 && id < num_experts, "expert id ", id, " at position ", i,
                      " is out of range; allowed are 0 to ", num_experts - 1, ", and -1 for no adapter");
    }
  }
  return {offsets, order};
}

}  // namespace moa
