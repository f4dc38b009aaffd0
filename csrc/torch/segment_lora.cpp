// Segment LoRA operators on the CPU: checks, allocation, kernels.
#include "lora/lora.h"

#include "common/scratch.h"
#include "isa/table.h"
#include "torch/cpu_arguments.h"
#include "torch/linear.h"

namespace moa {

Tensors2 segment_lora_cpu(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
                          const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
                          double scaling, const OptionalTensor& ranks, const OptionalTensor& base,
                          const OptionalTensor& bias, const OptionalTensor& weight) {
  ForwardParams p{};
  const Arguments a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, scaling, ranks);
  if (weight.has_value()) check_tensor(*weight, "weight", a.place, {p.out, p.in}, a.x.scalar_type());
  const Output out(&p, a, base, bias);
  mixture_and_linear(&p, out.y, a.x, weight, out.bias);
  return {out.y, out.h};
}

Tensors7 routed_lora_cpu(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& router_weight,
                         int64_t top_k, int64_t score_func, bool norm_topk_prob, double scaling,
                         const OptionalTensor& bias, const OptionalTensor& weight) {
  check_tensor(lora_A, "lora_A", place_of(x), {-1, -1, -1});
  check_tensor(router_weight, "router_weight", place_of(x), {lora_A.size(0), -1});
  const auto [logits, weights, indices, offsets, order] =
      linear_routing_cpu(x, router_weight, top_k, score_func, norm_topk_prob, std::nullopt, std::nullopt);
  const auto [y, h] = segment_lora_cpu(x, lora_A, lora_B, weights, offsets, order, std::nullopt, scaling, std::nullopt,
                                       std::nullopt, bias, weight);
  return {y, logits, weights, indices, offsets, order, h};
}

Tensors5 segment_lora_backward_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                                   const Tensor& weights, const Tensor& indices, const Tensor& expert_offsets,
                                   const Tensor& order, const Tensor& h, const OptionalTensor& expert_scaling,
                                   double scaling, const OptionalTensor& ranks, const OptionalTensor& router_weight,
                                   const OptionalTensor& logits, int64_t score_func, bool norm_topk_prob, bool need_x,
                                   bool need_A, bool need_B, bool need_weights, bool need_router,
                                   const OptionalTensor& weight) {
  BackwardParams p{};
  const Arguments a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, scaling, ranks);
  const Segments& s = p.seg;
  const Gradients g(&p, a, grad_y, h, router_weight, logits, score_func, norm_topk_prob, need_x, need_A, need_B,
                    need_weights, need_router);
  if (weight.has_value()) check_tensor(*weight, "weight", a.place, {p.out, p.in}, a.x.scalar_type());
  if (g.need_u) kernels().backward_shrink(p);

  OptionalTensor dz, dz_sorted;
  if (g.router) {
    check_tensor(indices, "indices", a.place, {s.tokens, s.top_k}, ScalarType::Long);
    dz = topk_routing_backward_cpu(g.dw, *logits, indices, score_func, norm_topk_prob);
    if (g.sparse) {
      dz_sorted = empty(a.place, {s.tokens * s.top_k}, a.acc);
      for (int64_t e = 0; e < s.experts; ++e)
        for (int64_t q = s.offsets[e]; q < s.offsets[e + 1]; ++q) {
          const int64_t at = s.order[q] / s.top_k * s.experts + e;
          if (a.acc == ScalarType::Double) {
            data<double>(*dz_sorted)[q] = data<double>(*dz)[at];
          } else {
            data<float>(*dz_sorted)[q] = data<float>(*dz)[at];
          }
        }
      p.dz = data<void>(*dz_sorted);
      p.router_weight = data<void>(*g.router_weight);
      p.d_router = need_router ? data<void>(g.d_router) : nullptr;
    }
  }
  kernels().backward_outer(p);
  if (g.router && !g.sparse) {
    RouterBackwardParams r{};
    r.x_type = p.x_type;
    r.tokens = s.tokens;
    r.in = p.in;
    r.experts = s.experts;
    r.x = p.x;
    r.ldx = p.ldx;
    r.weight = data<void>(*g.router_weight);
    r.dz = data<void>(*dz);
    r.dx = p.dx;
    r.d_weight = need_router ? data<void>(g.d_router) : nullptr;
    int32_t* rows = scratch<int32_t>(Scratch::call_first, s.tokens);
    for (int64_t t = 0; t < s.tokens; ++t) rows[t] = static_cast<int32_t>(t);
    r.rows = rows;
    kernels().router_backward(r);
  }
  if (need_x && weight.has_value()) add_linear_backward(g.dx, g.dy, *weight);
  return g.outputs();
}

}  // namespace moa
