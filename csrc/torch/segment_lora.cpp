// Segment LoRA operators on the CPU: checks, allocation, kernels.
#include "common/scratch.h"
#include "isa/table.h"
#include "torch/arguments.h"
#include "torch/ops.h"

namespace moa {
namespace {

// What stands for a gradient nobody asked for.
Tensor none(const Tensor& like) { return empty_cpu({0}, like.scalar_type()); }

}  // namespace

Tensors2 segment_lora_cpu(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
                          const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
                          double scaling, const OptionalTensor& ranks, const OptionalTensor& base,
                          const OptionalTensor& bias) {
  ForwardParams p{};
  const Arguments a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, scaling, ranks);
  const int64_t tokens = p.seg.tokens;
  OptionalTensor base_rows, bias_row;
  if (base.has_value()) base_rows = set_base(&p, *base, x);
  if (bias.has_value()) bias_row = set_bias(&p, *bias, x);
  Tensor y = empty_cpu({tokens, p.out}, x.scalar_type());
  Tensor h = empty_cpu({tokens * p.seg.top_k, p.rank}, a.acc);
  p.y = data<void>(y);
  p.h = data<void>(h);
  kernels().forward(p);
  return {y, h};
}

Tensors5 segment_lora_backward_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                                   const Tensor& weights, const Tensor& indices, const Tensor& expert_offsets,
                                   const Tensor& order, const Tensor& h, const OptionalTensor& expert_scaling,
                                   double scaling, const OptionalTensor& ranks, const OptionalTensor& router_weight,
                                   const OptionalTensor& logits, int64_t score_func, bool norm_topk_prob, bool need_x,
                                   bool need_A, bool need_B, bool need_weights, bool need_router) {
  BackwardParams p{};
  const Arguments a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, scaling, ranks);
  const Segments& s = p.seg;
  check_tensor(grad_y, "grad_y", {s.tokens, p.out}, x.scalar_type());
  check_tensor(h, "h", {s.tokens * s.top_k, p.rank}, a.acc);
  STD_TORCH_CHECK(router_weight.has_value() == logits.has_value(),
                  "router_weight and logits go together: give both or neither");
  STD_TORCH_CHECK(!need_router || router_weight.has_value(), "need_router without a router_weight");
  const Tensor dy = with_dense_rows(grad_y), hidden = dense(h);
  p.dy = data<void>(dy);
  p.lddy = row_stride(dy);
  p.h = data<void>(hidden);

  const bool router = router_weight.has_value() && (need_x || need_router);
  const bool sparse = score_func == 1 || norm_topk_prob;  // the gradient reaches the selected logits alone
  Tensor dx = need_x ? empty_cpu({s.tokens, p.in}, x.scalar_type()) : none(x);
  Tensor dA = need_A ? empty_cpu({s.experts, p.rank, p.in}, lora_A.scalar_type()) : none(x);
  Tensor dB = need_B ? empty_cpu({s.experts, p.out, p.rank}, lora_B.scalar_type()) : none(x);
  Tensor dw = need_weights || router ? empty_cpu({s.tokens, s.top_k}, a.acc) : none(x);
  Tensor d_router = need_router ? empty_cpu({s.experts, p.in}, a.acc) : none(x);
  p.dw = need_weights || router ? data<void>(dw) : nullptr;
  p.dx = need_x ? data<void>(dx) : nullptr;
  p.dA = need_A ? data<void>(dA) : nullptr;
  p.dB = need_B ? data<void>(dB) : nullptr;

  const bool need_u = need_x || need_A || p.dw != nullptr;
  Tensor u = empty_cpu({need_u ? s.tokens * s.top_k : 0, p.rank}, a.acc);
  p.u = data<void>(u);
  if (need_u) kernels().backward_shrink(p);

  OptionalTensor router_rows, dz, dz_sorted;
  if (router) {
    check_tensor(*router_weight, "router_weight", {s.experts, p.in}, a.acc);
    check_tensor(*logits, "logits", {s.tokens, s.experts}, a.acc);
    check_tensor(indices, "indices", {s.tokens, s.top_k}, ScalarType::Long);
    router_rows = dense(*router_weight);
    dz = topk_routing_backward_cpu(dw, *logits, indices, score_func, norm_topk_prob);
    if (sparse) {
      dz_sorted = empty_cpu({s.tokens * s.top_k}, a.acc);
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
      p.router_weight = data<void>(*router_rows);
      p.d_router = need_router ? data<void>(d_router) : nullptr;
    }
  }
  kernels().backward_outer(p);
  if (router && !sparse) {
    RouterBackwardParams r{};
    r.x_type = p.x_type;
    r.tokens = s.tokens;
    r.in = p.in;
    r.experts = s.experts;
    r.x = p.x;
    r.ldx = p.ldx;
    r.weight = data<void>(*router_rows);
    r.dz = data<void>(*dz);
    r.dx = p.dx;
    r.d_weight = need_router ? data<void>(d_router) : nullptr;
    int32_t* rows = scratch<int32_t>(Scratch::call_first, s.tokens);
    for (int64_t t = 0; t < s.tokens; ++t) rows[t] = static_cast<int32_t>(t);
    r.rows = rows;
    kernels().router_backward(r);
  }
  return {dx, dA, dB, need_weights ? dw : none(x), d_router};
}

}  // namespace moa
