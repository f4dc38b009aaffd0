#include "torch/arguments.h"

#include "torch/checks.h"

namespace moa {

// ---- routing ----

TopkArguments::TopkArguments(const Tensor& z, int64_t top_k, int64_t score_func, bool norm_topk_prob,
                             const OptionalTensor& bias, const OptionalTensor& rows)
    : logits((check_tensor(z, "logits", place_of(z), {-1, -1}), with_dense_rows(z))) {
  const Place place = place_of(z);
  const int64_t tokens = z.size(0), experts = z.size(1);
  check_topk(tokens, experts, top_k);
  p.logits_type = dtype_of(z, "logits");
  const ScalarType acc = acc_type(p.logits_type);
  if (bias.has_value()) {
    check_tensor(*bias, "selection_bias", place, {experts}, acc);
    selection_bias = dense(*bias);
    p.selection_bias = data<void>(*selection_bias);
  }
  if (rows.has_value()) {
    check_tensor(*rows, "mask", place, {tokens}, ScalarType::Bool);
    mask = dense(*rows);
    p.mask = data<bool>(*mask);
  }
  weights = empty(place, {tokens, top_k}, acc);
  indices = empty(place, {tokens, top_k}, ScalarType::Long);
  offsets = empty(place, {experts + 1}, ScalarType::Int);
  order = empty(place, {tokens * top_k}, ScalarType::Int);
  p.tokens = tokens;
  p.experts = experts;
  p.top_k = top_k;
  p.logits = data<void>(logits);
  p.ldz = row_stride(logits);
  p.score_func = score_func_of(score_func);
  p.norm_topk_prob = norm_topk_prob;
  p.weights = data<void>(weights);
  p.indices = data<int64_t>(indices);
}

TopkBackwardArguments::TopkBackwardArguments(const Tensor& grad, const Tensor& z, const Tensor& ids, int64_t score_func,
                                             bool norm_topk_prob) {
  const Place place = place_of(z);
  check_tensor(z, "logits", place, {-1, -1});
  p.tokens = z.size(0);
  p.experts = z.size(1);
  check_tensor(ids, "indices", place, {p.tokens, -1}, ScalarType::Long);
  p.logits_type = dtype_of(z, "logits");
  p.top_k = ids.size(1);
  check_tensor(grad, "grad_weights", place, {p.tokens, p.top_k}, acc_type(p.logits_type));
  logits = with_dense_rows(z);
  indices = dense(ids);
  grad_weights = dense(grad);
  grad_logits = empty(place, {p.tokens, p.experts}, z.scalar_type());
  p.logits = data<void>(logits);
  p.ldz = row_stride(logits);
  p.score_func = score_func_of(score_func);
  p.norm_topk_prob = norm_topk_prob;
  p.indices = data<int64_t>(indices);
  p.grad_weights = data<void>(grad_weights);
  p.grad_logits = data<void>(grad_logits);
}

SortArguments::SortArguments(const Tensor& ids, int64_t num_experts) : experts(num_experts) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "indices is ", name_of(ids.scalar_type()), ", expected int64");
  STD_TORCH_CHECK(num_experts >= 1, "num_experts is ", num_experts, "; allowed are 1 and more");
  const Place place = place_of(ids);
  indices = dense(ids);
  slots = ids.numel();
  check_slots(slots, 1, experts);
  offsets = empty(place, {experts + 1}, ScalarType::Int);
  order = empty(place, {slots}, ScalarType::Int);
}

RouterArguments::RouterArguments(const Tensor& x_, const Tensor& router_weight) {
  const Place place = place_of(x_);
  check_tensor(x_, "x", place, {-1, -1});
  p.x_type = dtype_of(x_, "x");
  const ScalarType acc = acc_type(p.x_type);
  check_tensor(router_weight, "router_weight", place, {-1, x_.size(1)}, acc);
  x = with_dense_rows(x_);
  weight = dense(router_weight);
  p.tokens = x.size(0);
  p.in = x.size(1);
  p.experts = weight.size(0);
  p.x = data<void>(x);
  p.ldx = row_stride(x);
  p.weight = data<void>(weight);
  logits = empty(place, {p.tokens, p.experts}, acc);
  p.logits = data<void>(logits);
}

// ---- mixture ----

LinearParams linear_params(const Tensor& y, const Tensor& x, const Tensor& weight) {
  LinearParams p{};
  p.type = dtype_of(x, "x");
  p.tokens = x.size(0);
  p.in = x.size(1);
  p.out = weight.size(0);
  p.x = data<void>(x);
  p.ldx = row_stride(x);
  p.weight = data<void>(weight);
  p.ldw = row_stride(weight);
  p.y = data<void>(y);
  return p;
}

Adapters::Adapters(LoraParams* p, const Tensor& x_, const Tensor& A, const Tensor& B)
    : place(place_of(x_)),
      x((check_tensor(x_, "x", place, {-1, -1}), with_dense_rows(x_))),
      lora_A((check_tensor(A, "lora_A", place, {-1, -1, x_.size(1)}), dense(A))),
      lora_B((check_tensor(B, "lora_B", place, {A.size(0), -1, A.size(1)}, A.scalar_type()), dense(B))) {
  p->x_type = dtype_of(x, "x");
  p->adapter_type = dtype_of(lora_A, "lora_A");
  const bool half = p->x_type == DType::bf16 || p->x_type == DType::f16;
  STD_TORCH_CHECK(p->adapter_type == p->x_type || (half && p->adapter_type == DType::f32), "lora_A and lora_B are ",
                  name_of(lora_A.scalar_type()), " under x of ", name_of(x.scalar_type()),
                  "; allowed are x's own dtype, and float32 under bfloat16 or float16");
  acc = acc_type(p->x_type);
  STD_TORCH_CHECK(lora_A.size(0) >= 1 && lora_A.size(1) >= 1, "lora_A has shape ", shape_of(lora_A),
                  "; at least one expert and rank 1 are needed");
  p->in = x.size(1);
  p->out = lora_B.size(1);
  p->rank = lora_A.size(1);
  p->x = data<void>(x);
  p->ldx = row_stride(x);
  p->lora_A = data<void>(lora_A);
  p->lora_B = data<void>(lora_B);
  p->scale = nullptr;
  p->ranks = nullptr;
}

Mixture::Mixture(LoraParams* p, const Tensor& x_, const Tensor& A, const Tensor& B, const Tensor& w, const Tensor& off,
                 const Tensor& ord, const OptionalTensor& scaling, const OptionalTensor& ranks_)
    : Adapters(p, x_, A, B),
      weights((check_tensor(w, "weights", place, {x_.size(0), -1}, acc), check_slots(w.size(0), w.size(1), A.size(0)),
               dense(w))),
      offsets((check_tensor(off, "expert_offsets", place, {A.size(0) + 1}, ScalarType::Int), dense(off))),
      order((check_tensor(ord, "order", place, {w.size(0) * w.size(1)}, ScalarType::Int), dense(ord))) {
  const int64_t experts = lora_A.size(0);
  p->seg = {data<int32_t>(offsets), data<int32_t>(order), x.size(0), weights.size(1), experts};
  p->weights = data<void>(weights);
  if (scaling.has_value()) {
    const bool f64 = scaling->scalar_type() == ScalarType::Double;
    check_tensor(*scaling, "expert_scaling", place, {experts}, f64 ? ScalarType::Double : ScalarType::Float);
    expert_scaling = dense(*scaling);
  }
  if (ranks_.has_value()) {
    const bool wide = ranks_->scalar_type() == ScalarType::Long;
    check_tensor(*ranks_, "ranks", place, {experts}, wide ? ScalarType::Long : ScalarType::Int);
    ranks = dense(*ranks_);
  }
}

OptionalTensor base_rows(const OptionalTensor& base, const Tensor& x) {
  if (!base.has_value()) return base;
  bool fits = base->dim() == x.dim();
  for (int64_t i = 0; fits && i < x.dim() - 1; ++i) fits = base->size(i) == x.size(i);
  STD_TORCH_CHECK(fits, "base has shape ", shape_of(*base), " beside x of shape ", shape_of(x),
                  "; all dimensions but the last must be the same");
  return as_rows(*base, "base");
}

Output::Output(ForwardParams* p, const Adapters& a, const OptionalTensor& base_, const OptionalTensor& bias_,
               bool keep_h) {
  const int64_t tokens = p->seg.tokens;
  const ScalarType type = a.x.scalar_type();
  if (base_.has_value()) {
    check_tensor(*base_, "base", a.place, {tokens, p->out}, type);
    base = with_dense_rows(*base_);
    p->base = data<void>(*base);
    p->ldbase = row_stride(*base);
  }
  if (bias_.has_value()) {
    check_tensor(*bias_, "bias", a.place, {p->out}, type);
    bias = dense(*bias_);
    p->bias = data<void>(*bias);
  }
  y = empty(a.place, {tokens, p->out}, type);
  p->y = data<void>(y);
  if (!keep_h) return;
  h = empty(a.place, {tokens * p->seg.top_k, p->rank}, a.acc);
  p->h = data<void>(h);
}

Gradients::Gradients(BackwardParams* p, const Mixture& a, const Tensor& grad_y, const Tensor& h_,
                     const OptionalTensor& router_weight_, const OptionalTensor& logits, int64_t score_func,
                     bool norm_topk_prob, bool need_x, bool need_A, bool need_B, bool need_weights_, bool need_router)
    : need_weights(need_weights_) {
  const Segments& s = p->seg;
  const ScalarType type = a.x.scalar_type();
  check_tensor(grad_y, "grad_y", a.place, {s.tokens, p->out}, type);
  check_tensor(h_, "h", a.place, {s.tokens * s.top_k, p->rank}, a.acc);
  STD_TORCH_CHECK(router_weight_.has_value() == logits.has_value(),
                  "router_weight and logits go together: give both or neither");
  STD_TORCH_CHECK(!need_router || router_weight_.has_value(), "need_router without a router_weight");
  router = router_weight_.has_value() && (need_x || need_router);
  sparse = score_func == 1 || norm_topk_prob;
  if (router) {
    check_tensor(*router_weight_, "router_weight", a.place, {s.experts, p->in}, a.acc);
    check_tensor(*logits, "logits", a.place, {s.tokens, s.experts}, a.acc);
    router_weight = dense(*router_weight_);
  }
  dy = with_dense_rows(grad_y);
  h = dense(h_);
  p->dy = data<void>(dy);
  p->lddy = row_stride(dy);
  p->h = data<void>(h);

  const auto none = [&] { return empty(a.place, {0}, type); };  // outputs may not share memory
  dx = need_x ? empty(a.place, {s.tokens, p->in}, type) : none();
  dA = need_A ? empty(a.place, {s.experts, p->rank, p->in}, a.lora_A.scalar_type()) : none();
  dB = need_B ? empty(a.place, {s.experts, p->out, p->rank}, a.lora_B.scalar_type()) : none();
  dw = need_weights || router ? empty(a.place, {s.tokens, s.top_k}, a.acc) : none();
  d_router = need_router ? empty(a.place, {s.experts, p->in}, a.acc) : none();
  p->dx = need_x ? data<void>(dx) : nullptr;
  p->dA = need_A ? data<void>(dA) : nullptr;
  p->dB = need_B ? data<void>(dB) : nullptr;
  p->dw = need_weights || router ? data<void>(dw) : nullptr;
  need_u = need_x || need_A || p->dw != nullptr;
  u = empty(a.place, {need_u ? s.tokens * s.top_k : 0, p->rank}, a.acc);
  p->u = data<void>(u);
}

Tensors5 Gradients::outputs() const {
  return {dx, dA, dB, need_weights ? dw : empty(place_of(dy), {0}, dy.scalar_type()), d_router};
}

}  // namespace moa
