// The layer without gradients, whole and in one call, on the CPU: mixture and base, with h and the routing in work
// memory. y holds bias, base and mixture first, and F.linear's own product is added to it: one pass less over y.
// Where no token has an adapter only that product is left.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/scratch.h"
#include "isa/table.h"
#include "torch/arguments.h"
#include "torch/checks.h"
#include "torch/ops.h"

namespace moa {
namespace {

// [..., n] as [T, n].
Tensor as_rows(const Tensor& t, const char* what) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims >= 1, what, " has no dimensions; expected [..., features]");
  return dims == 2 ? t : torch::stable::reshape(t, {-1, t.size(dims - 1)});
}

// y [T, out] with the leading dimensions of x.
Tensor shaped_as(const Tensor& y, const Tensor& x) {
  const int64_t dims = x.dim();
  if (dims == 2) return y;
  std::vector<int64_t> shape(dims);
  for (int64_t i = 0; i < dims - 1; ++i) shape[i] = x.size(i);
  shape[dims - 1] = y.size(1);
  return torch::stable::view(y, {shape.data(), shape.size()});
}

void check_weight(const Tensor& weight, const LoraParams& p, const Tensor& x) {
  check_tensor(weight, "weight", {p.out, p.in}, x.scalar_type());
}

// y = start + x W^T, the start being y itself, a bias [out] or nothing.
void add_linear(const Tensor& y, const OptionalTensor& start, const Tensor& x, const Tensor& weight) {
  const Tensor columns = torch::stable::transpose(weight, 0, 1);
  if (start.has_value()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), start->get(), x.get(), columns.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), x.get(), columns.get()));
  }
}

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
  if (weight.has_value()) check_weight(*weight, p, x);
  OptionalTensor bias_row, base_rows;
  if (bias.has_value()) bias_row = set_bias(&p, *bias, x);
  if (base.has_value()) {
    bool fits = base->dim() == x_.dim();
    for (int64_t i = 0; fits && i < x_.dim() - 1; ++i) fits = base->size(i) == x_.size(i);
    STD_TORCH_CHECK(fits, "base has shape ", shape_of(*base), " beside x of shape ", shape_of(x_),
                    "; all dimensions but the last must be the same");
    base_rows = set_base(&p, as_rows(*base, "base"), x);
  }
  Tensor y = empty_cpu({p.seg.tokens, p.out}, x.scalar_type());
  if (weight.has_value() && !base.has_value() && !any_adapter(p)) {
    add_linear(y, bias, a.x, *weight);  // what F.linear does
    return shaped_as(y, x_);
  }
  p.y = data<void>(y);
  p.h = scratch<char>(Scratch::call_second, (p.x_type == DType::f64 ? 8 : 4) * p.seg.tokens * p.seg.top_k * p.rank);
  kernels().forward(p);
  if (weight.has_value()) add_linear(y, y, a.x, *weight);
  return shaped_as(y, x_);
}

Tensor routed_linear_cpu(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                         bool norm_topk_prob, double scaling) {
  const Tensor x = as_rows(x_, "x");
  ForwardParams p{};
  const Adapters a(&p, x, lora_A, lora_B, scaling);
  const int64_t tokens = a.x.size(0), experts = a.lora_A.size(0), slots = tokens * top_k;
  check_tensor(router_weight, "router_weight", {experts, p.in}, a.acc);
  check_weight(weight, p, x);
  const Tensor router_rows = dense(router_weight);
  OptionalTensor bias_row;
  if (bias.has_value()) bias_row = set_bias(&p, *bias, x);
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
  Tensor y = empty_cpu({tokens, p.out}, x.scalar_type());
  p.seg = {offsets, order, tokens, top_k, experts};
  p.weights = t.weights;
  p.y = data<void>(y);
  p.h = take(acc_size * slots * p.rank);
  const KernelTable& k = kernels();
  k.router(r);
  k.topk(t);
  sort_by_expert(t.indices, slots, experts, offsets, order);
  k.forward(p);
  add_linear(y, y, a.x, weight);
  return shaped_as(y, x_);
}

}  // namespace moa
