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

void forward(const ForwardParams& p, CudaCall* call) {
  MOA_CUDA_CHECK(shrink_cuda(p, call->work(shrink_work(p)), call->stream()));
  MOA_CUDA_CHECK(expand_cuda(p, call->work(expand_work(p)), call->stream()));
}

// y += x W^T: the mixture with its bias is there, and the base is added to it, as on the CPU.
void add_linear(const Tensor& y, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(aoti_torch_cuda_addmm_out != nullptr, "moa_ops: this torch has no CUDA");
  check_tensor(weight, "weight", place_of(x), {y.size(1), x.size(1)}, x.scalar_type());
  CudaCall call(place_of(x));
  const Tensor columns = torch::stable::transpose(weight, 0, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(y.get(), y.get(), x.get(), columns.get(), 1.0, 1.0));
}

}  // namespace

Tensors2 segment_lora_cuda(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
                           const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
                           double scaling, const OptionalTensor& ranks, const OptionalTensor& base,
                           const OptionalTensor& bias) {
  CudaCall call(place_of(x));
  ForwardParams p{};
  const Mixture a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, ranks);
  const DeviceAdapters adapters(&p, a, scaling);
  const Output out(&p, a, base, bias);
  forward(p, &call);
  return {out.y, out.h};
}

Tensors5 linear_routing_cuda(const Tensor& x, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                             bool norm_topk_prob, const OptionalTensor& selection_bias, const OptionalTensor& mask) {
  CudaCall call(place_of(x));
  const RouterArguments a(x, router_weight);
  MOA_CUDA_CHECK(router_cuda(a.p, call.work(router_work(a.p)), call.stream()));
  auto [weights, indices, offsets, order] =
      topk_routing_cuda(a.logits, top_k, score_func, norm_topk_prob, selection_bias, mask);
  return {a.logits, weights, indices, offsets, order};
}

Tensor segment_linear_cuda(const Tensor& x_, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& base, const Tensor& lora_A, const Tensor& lora_B,
                           const Tensor& weights, const Tensor& expert_offsets, const Tensor& order,
                           const OptionalTensor& expert_scaling, double scaling, const OptionalTensor& ranks) {
  const Tensor x = as_rows(x_, "x");
  const auto [y, h] = segment_lora_cuda(x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, scaling,
                                        ranks, base_rows(base, x_), bias);
  if (weight.has_value()) add_linear(y, x, *weight);
  return with_leading(y, x_);
}

Tensor routed_linear_cuda(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                          const Tensor& lora_B, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                          bool norm_topk_prob, double scaling) {
  const Tensor x = as_rows(x_, "x");
  const auto [logits, gates, indices, offsets, order] =
      linear_routing_cuda(x, router_weight, top_k, score_func, norm_topk_prob, std::nullopt, std::nullopt);
  return segment_linear_cuda(x_, weight, bias, std::nullopt, lora_A, lora_B, gates, offsets, order, std::nullopt,
                             scaling, std::nullopt);
}

Tensors5 segment_lora_backward_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                                    const Tensor& weights, const Tensor& indices, const Tensor& expert_offsets,
                                    const Tensor& order, const Tensor& h, const OptionalTensor& expert_scaling,
                                    double scaling, const OptionalTensor& ranks, const OptionalTensor& router_weight,
                                    const OptionalTensor& logits, int64_t score_func, bool norm_topk_prob, bool need_x,
                                    bool need_A, bool need_B, bool need_weights, bool need_router) {
  CudaCall call(place_of(x));
  BackwardParams p{};
  const Mixture a(&p, x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, ranks);
  const DeviceAdapters adapters(&p, a, scaling);
  const Gradients g(&p, a, grad_y, h, router_weight, logits, score_func, norm_topk_prob, need_x, need_A, need_B,
                    need_weights, need_router);
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
  return g.outputs();
}

}  // namespace moa

STABLE_TORCH_LIBRARY_IMPL(moa_ops, CUDA, m) {
  m.impl("linear_routing", TORCH_BOX(&moa::linear_routing_cuda));
  m.impl("segment_lora", TORCH_BOX(&moa::segment_lora_cuda));
  m.impl("segment_linear", TORCH_BOX(&moa::segment_linear_cuda));
  m.impl("routed_linear", TORCH_BOX(&moa::routed_linear_cuda));
  m.impl("segment_lora_backward", TORCH_BOX(&moa::segment_lora_backward_cuda));
}
#endif
