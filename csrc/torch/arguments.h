// The operators' arguments, checked and taken apart into the parameters of the kernels: what the CPU and CUDA share.
// Every struct keeps alive what its parameters point to. Nothing here reads what a tensor holds.
#pragma once
#include "lora/lora.h"
#include "routing/routing.h"
#include "torch/ops.h"

namespace moa {

struct TopkArguments {
  TopkParams p{};
  Tensor logits, weights, indices, offsets, order;
  OptionalTensor selection_bias, mask;

  TopkArguments(const Tensor& logits, int64_t top_k, int64_t score_func, bool norm_topk_prob,
                const OptionalTensor& selection_bias, const OptionalTensor& mask);
  Tensors4 outputs() const { return {weights, indices, offsets, order}; }
};

struct TopkBackwardArguments {
  TopkBackwardParams p{};
  Tensor logits, indices, grad_weights, grad_logits;

  TopkBackwardArguments(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices, int64_t score_func,
                        bool norm_topk_prob);
};

struct SortArguments {
  int64_t slots, experts;
  Tensor indices, offsets, order;

  SortArguments(const Tensor& indices, int64_t num_experts);
};

struct RouterArguments {
  RouterParams p{};
  Tensor x, weight, logits;

  RouterArguments(const Tensor& x, const Tensor& router_weight);
};

// y and x W^T; all three have dense rows.
LinearParams linear_params(const Tensor& y, const Tensor& x, const Tensor& weight);

// x and the adapters, and whatever had to be copied to be read by a kernel. scale and ranks are left to the device.
struct Adapters {
  Place place;
  Tensor x, lora_A, lora_B;
  ScalarType acc;

  Adapters(LoraParams* p, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B);
};

// Adapters and a routing that came from outside: what forward and backward share.
struct Mixture : Adapters {
  Tensor weights, offsets, order;
  OptionalTensor expert_scaling, ranks;  // float32 or float64; int32 or int64

  Mixture(LoraParams* p, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& weights,
          const Tensor& expert_offsets, const Tensor& order, const OptionalTensor& expert_scaling,
          const OptionalTensor& ranks);
};

// What is added to the mixture, and where the sum goes.
struct Output {
  OptionalTensor base, bias;
  Tensor y, h;

  // Without keep_h, h is work memory that the caller sets.
  Output(ForwardParams* p, const Adapters& a, const OptionalTensor& base, const OptionalTensor& bias,
         bool keep_h = true);
};

// base [..., out] as [T, out], its leading dimensions those of x [..., in].
OptionalTensor base_rows(const OptionalTensor& base, const Tensor& x);

// The gradients, those that nobody needs empty. `dw` is there, too, where only the router needs it.
struct Gradients {
  Tensor dy, h, dx, dA, dB, dw, d_router, u;
  OptionalTensor router_weight;
  bool need_u, need_weights;
  bool router;  // the gradient of the weights flows on into x or the router
  bool sparse;  // and reaches the selected logits alone

  Gradients(BackwardParams* p, const Mixture& a, const Tensor& grad_y, const Tensor& h,
            const OptionalTensor& router_weight, const OptionalTensor& logits, int64_t score_func, bool norm_topk_prob,
            bool need_x, bool need_A, bool need_B, bool need_weights, bool need_router);
  Tensors5 outputs() const;
};

}  // namespace moa
