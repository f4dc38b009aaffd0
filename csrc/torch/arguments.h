// The arguments of the LoRA operators on the CPU: checked, and as the kernels take them.
#pragma once
#include <vector>

#include "lora/lora.h"
#include "torch/checks.h"

namespace moa {

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
        weights((check_tensor(w, "weights", {x_.size(0), -1}, acc), check_slots(w.size(0), w.size(1), A.size(0)),
                 dense(w))),
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

// The optional parts of what the mixture is added to, checked; the tensor returned keeps the memory alive.
inline Tensor set_bias(ForwardParams* p, const Tensor& bias, const Tensor& x) {
  check_tensor(bias, "bias", {p->out}, x.scalar_type());
  const Tensor row = dense(bias);
  p->bias = data<void>(row);
  return row;
}
inline Tensor set_base(ForwardParams* p, const Tensor& base, const Tensor& x) {
  check_tensor(base, "base", {x.size(0), p->out}, x.scalar_type());
  const Tensor rows = with_dense_rows(base);
  p->base = data<void>(rows);
  p->ldbase = row_stride(rows);
  return rows;
}

}  // namespace moa
