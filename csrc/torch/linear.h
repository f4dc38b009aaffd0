// The base's product beside the mixture, on the CPU: our own kernel for few tokens, else the library's GEMM.
#pragma once
#include "torch/tensors.h"

namespace moa {

// y = start + x W^T, the start being y itself, a bias [out] or nothing. What is handed in has been checked.
void linear_into(const Tensor& y, const OptionalTensor& start, const Tensor& x, const Tensor& weight);

}  // namespace moa
