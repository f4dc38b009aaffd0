// Segment LoRA operators on the CPU: checks, allocation, kernels.
#include "lora/lora.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <vector>

#include "common/scratch.h"
#include "isa/table.h"
#include "torch/arguments.h"
#include "torch/checks.h"

namespace moa {
namespace {

std::vector<double> scales(const OptionalTensor& expert_scaling, double scaling, int64_t experts) {
  std::vector<double> scale(experts, scaling);
  if (!expert_scaling.has_value()) return scale;
  const bool f64 = expert_scaling->scalar_type() == ScalarType::Double;
  for (int64_t e = 0; e < experts; ++e)
    scale[e] *= f64 ? data<double>(*expert_scaling)[e] : double{data<float>(*expert_scaling)[e]};
  return scale;
}

// A routing that came from outside: its contents are checked before a kernel indexes with them.
struct Arguments : Mixture {
  std::vector<double> scale;
  std::vector<int32_t> used;

  Arguments(LoraParams* p, const Tensor& x_, const Tensor& A, const Tensor& B, const Tensor& w, const Tensor& off,
            const Tensor& ord, const OptionalTensor& expert_scaling_, double scaling, const OptionalTensor& ranks_)
      : Mixture(p, x_, A, B, w, off, ord, expert_scaling_, ranks_),
        scale(scales(expert_scaling, scaling, p->seg.experts)) {
    check_segments(p->seg);
    p->scale = scale.data();
    if (!ranks.has_value()) return;
    const bool wide = ranks->scalar_type() == ScalarType::Long;
    for (int64_t e = 0; e < p->seg.experts; ++e) {
      const int64_t rank = wide ? data<int64_t>(*ranks)[e] : data<int32_t>(*ranks)[e];
      STD_TORCH_CHECK(rank >= 0 && rank <= p->rank, "ranks[", e, "] is ", rank, "; allowed are 0 to ", p->rank,
                      ", the rows of lora_A");
      used.push_back(static_cast<int32_t>(rank));
    }
    p->ranks = used.data();
  }

  // What a kernel will index with, before it does.
  static void check_segments(const Segments& s) {
    const int64_t slots = s.tokens * s.top_k;
    STD_TORCH_CHECK(s.offsets[0] == 0 && s.offsets[s.experts] <= slots, "expert_offsets run from ", s.offsets[0],
                    " to ", s.offsets[s.experts], "; they must start at 0 and end at most at ", slots);
    for (int64_t e = 0; e < s.experts; ++e)
      STD_TORCH_CHECK(s.offsets[e] <= s.offsets[e + 1], "expert_offsets fall from ", s.offsets[e], " to ",
                      s.offsets[e + 1], " at expert ", e, "; they must ascend");
    uint32_t outside = 0;
    for (int64_t i = 0; i < slots; ++i) outside |= static_cast<uint32_t>(s.order[i]) >= static_cast<uint32_t>(slots);
    STD_TORCH_CHECK(outside == 0, "order has an entry outside 0 to ", slots - 1, ": it must permute the ", slots,
                    " slots");
    // Kernels find an expert's slots in a block of tokens by bisection.
    for (int64_t e = 0; e < s.experts; ++e) {
      int falls = 0;
      for (int64_t i = s.offsets[e] + 1; i < s.offsets[e + 1]; ++i) falls |= s.order[i] <= s.order[i - 1];
      STD_TORCH_CHECK(falls == 0, "order does not ascend within the segment of expert ", e,
                      "; moa_ops::sort_by_expert makes it so");
    }
  }
};

}  // namespace

Tensors2 segment_lora_cpu(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
                          const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
                          double scaling, const OptionalTensor& ranks, const OptionalTensor& base,
                          const OptionalTensor& bias) {
  ForwardParams p{};
  const Arguments a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, scaling, ranks);
  const Output out(&p, a, base, bias);
  kernels().forward(p);
  return {out.y, out.h};
}

Tensor routed_linear_cpu(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                         bool norm_topk_prob, double scaling) {
  STD_TORCH_CHECK(x_.dim() >= 1, "x has no dimensions; expected [..., in]");
  const int64_t dims = x_.dim();
  const Tensor x = dims == 2 ? x_ : torch::stable::reshape(x_, {-1, x_.size(dims - 1)});
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
  k.forward(p);
  // The mixture with its bias is there; the base is added to it, which spares a pass over y.
  const Tensor columns = torch::stable::transpose(weight, 0, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), y.get(), a.x.get(), columns.get(), 1.0, 1.0));
  if (dims == 2) return y;
  std::vector<int64_t> shape(dims);
  for (int64_t i = 0; i < dims - 1; ++i) shape[i] = x_.size(i);
  shape[dims - 1] = p.out;
  return torch::stable::view(y, {shape.data(), shape.size()});
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
  const Gradients g(&p, a, grad_y, h, router_weight, logits, score_func, norm_topk_prob, need_x, need_A, need_B,
                    need_weights, need_router);
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
  return g.outputs();
}

}  // namespace moa
