// Segment LoRA operators on the CPU: checks, allocation, kernels.
#include "lora/lora.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <vector>

#include "common/scratch.h"
#include "isa/table.h"
#include "torch/checks.h"
#include "torch/ops.h"

namespace moa {
namespace {

// x and the adapters, checked, and whatever had to be copied to be read by a kernel.
struct Adapters {
  Tensor x, lora_A, lora_B;
  std::vector<double> scale;
  ScalarType acc;

  Adapters(LoraParams* p, const Tensor& x_, const Tensor& A, const Tensor& B, double scaling)
      : x((check_tensor(x_, "x", {-1, -1}), with_dense_rows(x_))),
        lora_A((check_tensor(A, "lora_A", {-1, -1, x_.size(1)}), dense(A))),
        lora_B((check_tensor(B, "lora_B", {A.size(0), -1, A.size(1)}, A.scalar_type()), dense(B))) {
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
    scale.assign(lora_A.size(0), scaling);
    p->scale = scale.data();
    p->ranks = nullptr;
  }
};

// Adapters and a routing that came from outside: what forward and backward share.
struct Arguments : Adapters {
  Tensor weights, offsets, order;
  std::vector<int32_t> ranks;

  Arguments(LoraParams* p, const Tensor& x_, const Tensor& A, const Tensor& B, const Tensor& w, const Tensor& off,
            const Tensor& ord, const OptionalTensor& expert_scaling, double scaling, const OptionalTensor& ranks_)
      : Adapters(p, x_, A, B, scaling),
        weights((check_tensor(w, "weights", {x_.size(0), -1}, acc), dense(w))),
        offsets((check_tensor(off, "expert_offsets", {A.size(0) + 1}, ScalarType::Int), dense(off))),
        order((check_tensor(ord, "order", {w.size(0) * w.size(1)}, ScalarType::Int), dense(ord))) {
    const int64_t experts = lora_A.size(0);
    p->seg = {data<int32_t>(offsets), data<int32_t>(order), x.size(0), weights.size(1), experts};
    check_segments(p->seg);
    p->weights = data<void>(weights);
    if (expert_scaling.has_value()) {
      check_tensor(*expert_scaling, "expert_scaling", {experts});
      const Tensor s = dense(*expert_scaling);
      if (dtype_of(s, "expert_scaling") == DType::f64) {
        for (int64_t e = 0; e < experts; ++e) scale[e] *= data<double>(s)[e];
      } else {
        check_tensor(s, "expert_scaling", {experts}, ScalarType::Float);
        for (int64_t e = 0; e < experts; ++e) scale[e] *= static_cast<double>(data<float>(s)[e]);
      }
    }
    if (!ranks_.has_value()) return;
    check_tensor(*ranks_, "ranks", {experts});
    const Tensor r = dense(*ranks_);
    const bool wide = r.scalar_type() == ScalarType::Long;
    if (!wide) check_tensor(r, "ranks", {experts}, ScalarType::Int);
    ranks.resize(experts);
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t rank = wide ? data<int64_t>(r)[e] : data<int32_t>(r)[e];
      STD_TORCH_CHECK(rank >= 0 && rank <= p->rank, "ranks[", e, "] is ", rank, "; allowed are 0 to ", p->rank,
                      ", the rows of lora_A");
      ranks[e] = static_cast<int32_t>(rank);
    }
    p->ranks = ranks.data();
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
  if (base.has_value()) {
    check_tensor(*base, "base", {tokens, p.out}, x.scalar_type());
    base_rows = with_dense_rows(*base);
    p.base = data<void>(*base_rows);
    p.ldbase = row_stride(*base_rows);
  }
  if (bias.has_value()) {
    check_tensor(*bias, "bias", {p.out}, x.scalar_type());
    bias_row = dense(*bias);
    p.bias = data<void>(*bias_row);
  }
  Tensor y = empty_cpu({tokens, p.out}, x.scalar_type());
  Tensor h = empty_cpu({tokens * p.seg.top_k, p.rank}, a.acc);
  p.y = data<void>(y);
  p.h = data<void>(h);
  kernels().forward(p);
  return {y, h};
}

Tensor routed_linear_cpu(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& router_weight, int64_t top_k, int64_t score_func,
                         bool norm_topk_prob, double scaling) {
  STD_TORCH_CHECK(x_.dim() >= 1, "x has no dimensions; expected [..., in]");
  const int64_t dims = x_.dim();
  const Tensor x = dims == 2 ? x_ : torch::stable::reshape(x_, {-1, x_.size(dims - 1)});
  ForwardParams p{};
  const Adapters a(&p, x, lora_A, lora_B, scaling);
  const int64_t tokens = a.x.size(0), experts = a.lora_A.size(0), slots = tokens * top_k;
  check_tensor(router_weight, "router_weight", {experts, p.in}, a.acc);
  check_tensor(weight, "weight", {p.out, p.in}, x.scalar_type());
  const Tensor router_rows = dense(router_weight);
  OptionalTensor bias_row;
  if (bias.has_value()) {
    check_tensor(*bias, "bias", {p.out}, x.scalar_type());
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
