// The base's product beside the mixture, on the CPU: our own kernel where that is faster, else the
// library's GEMM.
#pragma once
#include "torch/tensors.h"

namespace moa {

// Whether add_linear takes our own kernel.
bool own_linear(const Tensor& x, const Tensor& weight);

// y = start + x W^T as F.linear computes it, the start being y itself, a bias [out] or nothing.
void library_linear(const Tensor& y, const OptionalTensor& start, const Tensor& x, const Tensor& weight);

// y += x W^T, where y holds the bias and the mixture. Where some token has no mixture, as all have in a layer whose
// adapters are fresh and those of the base model alone in a batch by id, the library multiplies: such a token's row is
// F.linear's own, bit for bit. What is handed in has been checked; y is contiguous.
void add_linear(const Tensor& y, const OptionalTensor& bias, const Tensor& x, const Tensor& weight);

}  // namespace moa
