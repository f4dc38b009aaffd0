// Segment LoRA operators on CUDA: the checks of the CPU's (arguments.h), and the kernels one after another on the
// current stream. What offsets, order, ids and ranks hold is not looked at here: the kernels take no address from them
// that they have not checked (lora/cuda.h).
#ifdef MOA_WITH_CUDA
#include "lora/cuda.h"
#include "torch/arguments.h"
#include "torch/checks.h"
#include "torch/cuda_ops.h"

namespace moa {
namespace {

// The scales and ranks where the kernels read them, on the device and in their types.
struct DeviceAdapters {
  OptionalTensor scale, ranks;

  DeviceAdapters(LoraParams* p, const Mixture& a, double scaling) {
    p->scaling = scaling;
    if (a.expert_scaling.has_value()) {
      scale = torch::stable::to(*a.expert_scaling, ScalarType::Double);
      p->scale = data<double>(*scale);
    }
    if (a.ranks.has_value()) {
      ranks = torch::stable::to(*a.ranks, ScalarType::Int);
      p->ranks = data<int32_t>(*ranks);
    }
  }
};

// y = beta start + a b by torch's own GEMM; a start that counts zero times is not read.
void gemm(const Tensor& y, const Tensor& start, double beta, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(aoti_torch_cuda_addmm_out != nullptr, "moa_ops: this torch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(y.get(), start.get(), a.get(), b.get(), beta, 1.0));
}

// y = start + x W^T, where start is y itself, a bias or nothing; few tokens by our own product.
void linear(const CudaCall& call, const Tensor& y, const OptionalTensor& start, const Tensor& x, const Tensor& weight) {
  SkinnyParams p{};
  static_cast<LinearParams&>(p) = linear_params(y, x, weight);
  if (rows_are_dense(x) && rows_are_dense(weight) && skinny_fits(p)) {
    if (start.has_value()) p.start = data<void>(*start);
    p.ldstart = start.has_value() && start->dim() == 2 ? p.out : 0;
    MOA_CUDA_CHECK(skinny_linear_cuda(p, call.stream()));
    return;
  }
  const Tensor columns = torch::stable::transpose(weight, 0, 1);
  gemm(y, start.has_value() ? *start : y, start.has_value() ? 1.0 : 0.0, x, columns);
}

// y += x W^T where there is a weight: y holds the mixture with its bias, as on the CPU.
void add_base(const CudaCall& call, const Tensor& y, const Tensor& x, const OptionalTensor& weight) {
  if (weight.has_value()) linear(call, y, y, x, *weight);
}

// For the launches that multiply the base, too, as far as they can take it.
void set_weight(ForwardParams* p, const OptionalTensor& weight) {
  if (!weight.has_value() || !rows_are_dense(*weight)) return;
  p->weight = data<void>(*weight);
  p->ldw = row_stride(*weight);
}

void check_weight(const OptionalTensor& weight, const LoraParams& p, const Adapters& a) {
  if (weight.has_value()) check_tensor(*weight, "weight", a.place, {p.out, p.in}, a.x.scalar_type());
}

}  // namespace

Tensors2 segment_lora_cuda(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
                           const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
                           double scaling, const OptionalTensor& ranks, const OptionalTensor& base,
                           const OptionalTensor& bias, const OptionalTensor& weight) {
  CudaCall call(place_of(x));
  ForwardParams p{};
  const Mixture a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, ranks);
  check_experts(p.seg.experts);
  const DeviceAdapters adapters(&p, a, scaling);
  check_weight(weight, p, a);
  const Output out(&p, a, base, bias);
  MOA_CUDA_CHECK(mixture_cuda(p, call.work(mixture_work(p)), call.stream()));
  add_base(call, out.y, a.x, weight);
  return {out.y, out.h};
}

Tensor segment_linear_cuda(const Tensor& x_, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& base, const Tensor& lora_A, const Tensor& lora_B,
                           const Tensor& weights, const Tensor& expert_offsets, const Tensor& order,
                           const OptionalTensor& expert_scaling, double scaling, const OptionalTensor& ranks) {
  const Tensor x = as_rows(x_, "x");
  CudaCall call(place_of(x));
  ForwardParams p{};
  const Mixture a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, ranks);
  check_experts(p.seg.experts);
  const DeviceAdapters adapters(&p, a, scaling);
  check_weight(weight, p, a);
  const Output out(&p, a, base_rows(base, x_), bias, /*keep_h=*/false);
  set_weight(&p, weight);
  if (p.weight != nullptr && !mixture_multiplies(p)) p.weight = nullptr;
  MOA_CUDA_CHECK(mixture_cuda(p, call.work(mixture_work(p)), call.stream()));
  if (p.weight == nullptr) add_base(call, out.y, a.x, weight);
  return with_leading(out.y, x_);
}

// Few tokens: two launches do everything. Many: router and shrink in one pass over x, where the plan has it so.
Tensors7 routed_lora_cuda(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& router_weight,
                          int64_t top_k, int64_t score_func, bool norm_topk_prob, double scaling,
                          const OptionalTensor& bias, const OptionalTensor& weight) {
  CudaCall call(place_of(x));
  RoutedShrinkParams p{};
  const Adapters a(&p, x, lora_A, lora_B);
  const int64_t tokens = a.x.size(0), experts = a.lora_A.size(0);
  check_tensor(router_weight, "router_weight", a.place, {experts, p.in}, a.acc);
  check_weight(weight, p, a);
  check_topk(tokens, experts, top_k);
  check_experts(experts);
  p.seg = {nullptr, nullptr, tokens, top_k, experts};
  p.scaling = scaling;
  DecodeParams few{};
  static_cast<ForwardParams&>(few) = p;
  if (tokens > 0 && decode_fits(few)) {
    const Output out(&few, a, std::nullopt, bias);
    const Tensor router_rows = dense(router_weight), logits = empty(a.place, {tokens, experts}, a.acc);
    const Tensor weights = empty(a.place, {tokens, top_k}, a.acc);
    const Tensor indices = empty(a.place, {tokens, top_k}, ScalarType::Long);
    const Tensor offsets = empty(a.place, {experts + 1}, ScalarType::Int);
    const Tensor order = empty(a.place, {tokens * top_k}, ScalarType::Int);
    few.router_weight = data<void>(router_rows);
    few.score_func = score_func_of(score_func);
    few.norm_topk_prob = norm_topk_prob;
    few.logits = data<void>(logits);
    few.gates = data<void>(weights);
    few.indices = data<int64_t>(indices);
    few.offsets = data<int32_t>(offsets);
    few.order = data<int32_t>(order);
    MOA_CUDA_CHECK(decode_cuda(few, call.work(decode_work(few)), call.stream()));
    add_base(call, out.y, a.x, weight);
    return {out.y, logits, weights, indices, offsets, order, out.h};
  }
  if (!routed_shrink_fits(p)) {
    const auto [logits, weights, indices, offsets, order] =
        linear_routing_cuda(x, router_weight, top_k, score_func, norm_topk_prob, std::nullopt, std::nullopt);
    const auto [y, h] = segment_lora_cuda(x, lora_A, lora_B, weights, offsets, order, std::nullopt, scaling,
                                          std::nullopt, std::nullopt, bias, weight);
    return {y, logits, weights, indices, offsets, order, h};
  }
  const Tensor router_rows = dense(router_weight);
  const Tensor all = empty(a.place, {static_cast<int64_t>(routed_shrink_all(p))}, ScalarType::Byte);
  const Tensor logits = empty(a.place, {tokens, experts}, a.acc);
  p.router_weight = data<void>(router_rows);
  p.all = data<void>(all);
  p.logits = data<void>(logits);
  MOA_CUDA_CHECK(routed_shrink_cuda(p, call.work(routed_shrink_work(p)), call.stream()));
  const auto [weights, indices, offsets, order] =
      topk_routing_cuda(logits, top_k, score_func, norm_topk_prob, std::nullopt, std::nullopt);
  p.seg = {data<int32_t>(offsets), data<int32_t>(order), tokens, top_k, experts};
  p.weights = data<void>(weights);
  const Output out(&p, a, std::nullopt, bias);
  MOA_CUDA_CHECK(pick_cuda(p, p.all, call.stream()));
  MOA_CUDA_CHECK(expand_cuda(p, call.work(expand_work(p)), call.stream()));
  add_base(call, out.y, a.x, weight);
  return {out.y, logits, weights, indices, offsets, order, out.h};
}

Tensor routed_linear_cuda(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                          const Tensor& lora_B, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                          bool norm_topk_prob, double scaling) {
  const Tensor x = as_rows(x_, "x");
  CudaCall call(place_of(x));
  DecodeParams p{};
  const Adapters a(&p, x, lora_A, lora_B);
  const int64_t tokens = a.x.size(0), experts = a.lora_A.size(0);
  check_tensor(router_weight, "router_weight", a.place, {experts, p.in}, a.acc);
  check_tensor(weight, "weight", a.place, {p.out, p.in}, x.scalar_type());
  if (bias.has_value()) check_tensor(*bias, "bias", a.place, {p.out}, x.scalar_type());
  const OptionalTensor bias_row = bias.has_value() ? OptionalTensor(dense(*bias)) : std::nullopt;
  check_topk(tokens, experts, top_k);
  check_experts(experts);
  p.seg = {nullptr, nullptr, tokens, top_k, experts};
  p.scaling = scaling;
  p.score_func = score_func_of(score_func);
  p.norm_topk_prob = norm_topk_prob;
  if (decode_fits(p)) {  // few tokens: two launches, of which the second multiplies the base, or the first is beside it
    const Tensor router_rows = dense(router_weight);
    p.router_weight = data<void>(router_rows);
    const Tensor y = empty(a.place, {tokens, p.out}, x.scalar_type());
    p.y = data<void>(y);
    if (bias_row.has_value()) p.bias = data<void>(*bias_row);
    set_weight(&p, weight);
    if (decode_multiplies(p)) {
      MOA_CUDA_CHECK(decode_cuda(p, call.work(decode_work(p)), call.stream()));
      return with_leading(y, x_);
    }
    p.weight = nullptr;
    void* const work = call.work(decode_work(p));
    Fork fork(call);
    MOA_CUDA_CHECK(decode_first_cuda(p, work, fork.stream()));
    linear(call, y, bias_row, a.x, weight);
    fork.join();
    MOA_CUDA_CHECK(decode_second_cuda(p, work, call.stream()));
    return with_leading(y, x_);
  }
  RoutedShrinkParams many{};
  static_cast<ForwardParams&>(many) = p;
  if (!routed_shrink_fits(many) || !expand_all_fits(many)) {
    const auto [logits, weights, indices, offsets, order] =
        linear_routing_cuda(a.x, router_weight, top_k, score_func, norm_topk_prob, std::nullopt, std::nullopt);
    return segment_linear_cuda(x_, weight, bias, std::nullopt, lora_A, lora_B, weights, offsets, order, std::nullopt,
                               scaling, std::nullopt);
  }
  // Many: router and every expert's A in one pass over x; expand takes what the ids say, and nothing is sorted.
  const Tensor router_rows = dense(router_weight), y = empty(a.place, {tokens, p.out}, x.scalar_type());
  const Tensor all = empty(a.place, {static_cast<int64_t>(routed_shrink_all(many))}, ScalarType::Byte);
  const Tensor logits = empty(a.place, {tokens, experts}, a.acc);
  many.router_weight = data<void>(router_rows);
  many.all = data<void>(all);
  many.logits = data<void>(logits);
  many.bias = bias_row.has_value() ? data<void>(*bias_row) : nullptr;
  many.y = data<void>(y);
  MOA_CUDA_CHECK(routed_shrink_cuda(many, call.work(routed_shrink_work(many)), call.stream()));
  const TopkArguments routing(logits, top_k, score_func, norm_topk_prob, std::nullopt, std::nullopt);
  MOA_CUDA_CHECK(topk_cuda(routing.p, nullptr, nullptr, nullptr, call.stream()));
  many.weights = data<void>(routing.weights);
  const int64_t* const ids = data<int64_t>(routing.indices);
  MOA_CUDA_CHECK(expand_all_cuda(many, ids, call.work(expand_all_work(many)), call.stream()));
  linear(call, y, y, a.x, weight);
  return with_leading(y, x_);
}

Tensors5 segment_lora_backward_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                                    const Tensor& weights, const Tensor& indices, const Tensor& expert_offsets,
                                    const Tensor& order, const Tensor& h, const OptionalTensor& expert_scaling,
                                    double scaling, const OptionalTensor& ranks, const OptionalTensor& router_weight,
                                    const OptionalTensor& logits, int64_t score_func, bool norm_topk_prob, bool need_x,
                                    bool need_A, bool need_B, bool need_weights, bool need_router,
                                    const OptionalTensor& weight) {
  CudaCall call(place_of(x));
  BackwardParams p{};
  const Mixture a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, ranks);
  check_experts(p.seg.experts);
  const DeviceAdapters adapters(&p, a, scaling);
  const Gradients g(&p, a, grad_y, h, router_weight, logits, score_func, norm_topk_prob, need_x, need_A, need_B,
                    need_weights, need_router);
  check_weight(weight, p, a);
  if (g.need_u) MOA_CUDA_CHECK(backward_shrink_cuda(p, call.work(backward_shrink_work(p)), call.stream()));

  OptionalTensor dz, dz_sorted;
  if (g.router) {
    const Segments& s = p.seg;
    check_tensor(indices, "indices", a.place, {s.tokens, s.top_k}, ScalarType::Long);
    TopkBackwardArguments t(g.dw, *logits, indices, score_func, norm_topk_prob);
    if (g.sparse) {
      dz_sorted = empty(a.place, {s.tokens * s.top_k}, a.acc);
      t.p.grad_logits = data<void>(*dz_sorted);
      MOA_CUDA_CHECK(topk_backward_sorted_cuda(t.p, s.order, call.stream()));
      p.dz = data<void>(*dz_sorted);
      p.router_weight = data<void>(*g.router_weight);
      p.d_router = need_router ? data<void>(g.d_router) : nullptr;
    } else {
      MOA_CUDA_CHECK(topk_backward_cuda(t.p, call.stream()));
      dz = t.grad_logits;
    }
  }
  if (p.dx != nullptr) MOA_CUDA_CHECK(backward_expand_cuda(p, call.work(backward_expand_work(p)), call.stream()));
  if (p.dA != nullptr || p.dB != nullptr || p.d_router != nullptr)
    MOA_CUDA_CHECK(gram_cuda(p, call.work(gram_work(p)), call.stream()));
  if (g.router && !g.sparse) {
    RouterBackwardParams r{};
    r.x_type = p.x_type;
    r.tokens = p.seg.tokens;
    r.in = p.in;
    r.experts = p.seg.experts;
    r.x = p.x;
    r.ldx = p.ldx;
    r.weight = data<void>(*g.router_weight);
    r.dz = data<void>(*dz);
    r.dx = p.dx;
    r.d_weight = need_router ? data<void>(g.d_router) : nullptr;
    MOA_CUDA_CHECK(router_backward_cuda(r, call.work(router_backward_work(r)), call.stream()));
  }
  if (need_x && weight.has_value()) gemm(g.dx, g.dx, 1.0, g.dy, *weight);
  return g.outputs();
}

}  // namespace moa

STABLE_TORCH_LIBRARY_IMPL(moa_ops, CUDA, m) {
  m.impl("segment_lora", TORCH_BOX(&moa::segment_lora_cuda));
  m.impl("routed_lora", TORCH_BOX(&moa::routed_lora_cuda));
  m.impl("segment_linear", TORCH_BOX(&moa::segment_linear_cuda));
  m.impl("routed_linear", TORCH_BOX(&moa::routed_linear_cuda));
  m.impl("segment_lora_backward", TORCH_BOX(&moa::segment_lora_backward_cuda));
}
#endif
