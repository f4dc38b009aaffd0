// The layer without gradients, whole and in one call, on the CPU: mixture and base (linear.h), with h and the routing in
// work memory. Where no token has an adapter only the product is left.
#include "common/scratch.h"
#include "isa/table.h"
#include "torch/checks.h"
#include "torch/cpu_arguments.h"
#include "torch/linear.h"

namespace moa {
namespace {

// Whether some slot has an adapter of rank 1 or more.
bool any_adapter(const LoraParams& p) {
  if (p.ranks == nullptr) return p.seg.slots() > 0;
  for (int64_t e = 0; e < p.seg.experts; ++e)
    if (p.ranks[e] > 0 && p.seg.offsets[e] < p.seg.offsets[e + 1]) return true;
  return false;
}

}  // namespace

Tensor segment_linear_cpu(const Tensor& x_, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& base, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
                          const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
                          double scaling, const OptionalTensor& ranks) {
  const Tensor x = as_rows(x_, "x");
  ForwardParams p{};
  const Arguments a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, scaling, ranks);
  if (weight.has_value()) check_tensor(*weight, "weight", a.place, {p.out, p.in}, x.scalar_type());
  const Output out(&p, a, base_rows(base, x_), bias, /*keep_h=*/false);
  if (weight.has_value() && !base.has_value() && !any_adapter(p)) {
    library_linear(out.y, bias, a.x, *weight);  // what F.linear does
    return with_leading(out.y, x_);
  }
  p.h = scratch<char>(Scratch::call_second, (p.x_type == DType::f64 ? 8 : 4) * p.seg.tokens * p.seg.top_k * p.rank);
  mixture_and_linear(&p, out.y, a.x, weight, bias);
  return with_leading(out.y, x_);
}

Tensor routed_linear_cpu(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                         bool norm_topk_prob, double scaling) {
  const Tensor x = as_rows(x_, "x");
  ForwardParams p{};
  const Adapters a(&p, x, lora_A, lora_B);
  const int64_t tokens = a.x.size(0), experts = a.lora_A.size(0), slots = tokens * top_k;
  check_tensor(router_weight, "router_weight", a.place, {experts, p.in}, a.acc);
  check_tensor(weight, "weight", a.place, {p.out, p.in}, x.scalar_type());
  const std::vector<double> scale(experts, scaling);
  p.scale = scale.data();
  const Tensor router_rows = dense(router_weight);
  OptionalTensor bias_row;
  if (bias.has_value()) {
    check_tensor(*bias, "bias", a.place, {p.out}, x.scalar_type());
    bias_row = dense(*bias);
    p.bias = data<void>(*bias_row);
  }
  check_topk(tokens, experts, top_k);
  // One block of work memory for what the operators would return: logits, weights, h, ids, offsets, order.
  const size_t acc_size = p.x_type == DType::f64 ? 8 : 4;
  char* at = scratch<char>(Scratch::call_second, acc_size * (tokens * experts + slots * (1 + p.rank)) + 12 * slots +
                                                     4 * (experts + 1) + 6 * 64);
  auto take = [&](size_t bytes) {
    char* block = at;
    at += (bytes + 63) / 64 * 64;
    return block;
  };
  RouterParams r{};
  r.x_type = p.x_type;
  r.tokens = tokens;
  r.in = p.in;
  r.experts = experts;
  r.x = p.x;
  r.ldx = p.ldx;
  r.weight = data<void>(router_rows);
  r.logits = take(acc_size * tokens * experts);
  TopkParams t{};
  t.logits_type = p.x_type == DType::f64 ? DType::f64 : DType::f32;
  t.tokens = tokens;
  t.experts = experts;
  t.top_k = top_k;
  t.logits = r.logits;
  t.ldz = experts;
  t.score_func = score_func_of(score_func);
  t.norm_topk_prob = norm_topk_prob;
  t.weights = take(acc_size * slots);
  t.indices = reinterpret_cast<int64_t*>(take(8 * slots));
  int32_t* offsets = reinterpret_cast<int32_t*>(take(4 * (experts + 1)));
  int32_t* order = reinterpret_cast<int32_t*>(take(4 * slots));
  Tensor y = empty(a.place, {tokens, p.out}, x.scalar_type());
  p.seg = {offsets, order, tokens, top_k, experts};
  p.weights = t.weights;
  p.y = data<void>(y);
  p.h = take(acc_size * slots * p.rank);
  const KernelTable& k = kernels();
  k.router(r);
  k.topk(t);
  sort_by_expert(t.indices, slots, experts, offsets, order);
  mixture_and_linear(&p, y, a.x, weight, bias_row);
  return with_leading(y, x_);
}

}  // namespace moa
