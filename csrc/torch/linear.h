// The base's product beside the mixture, on the CPU: our own kernel where that is faster, else the library's GEMM. What is
// handed in has been checked.
#pragma once
#include "lora/lora.h"
#include "torch/tensors.h"

namespace moa {

// y = start + x W^T as F.linear computes it, the start being y itself, a bias [out] or nothing.
void library_linear(const Tensor& y, const OptionalTensor& start, const Tensor& x, const Tensor& weight);

// y = base + bias + mixture + x W^T; p holds base, bias and y, which is contiguous, and weight may be absent. In full
// precision y holds bias and mixture first, and F.linear's own product is added to it: one pass less over y. In half
// precision that addition slows the product itself by 4 %, and would round y twice: there the product comes first, and the
// mixture is added in float32. A product of our own (lora/linear.h) comes last.
void mixture_and_linear(ForwardParams* p, const Tensor& y, const Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias);

// grad_x += grad_y W; grad_x is contiguous, grad_y's rows are.
void add_linear_backward(const Tensor& grad_x, const Tensor& grad_y, const Tensor& weight);

}  // namespace moa
