// Tensors to pointers: the checks that stand between Python and a kernel. Every message says what was given and what
// is allowed.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "common/types.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10 and 2.11 have the other name alone
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace moa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::string shape_of(const Tensor& t);
const char* name_of(ScalarType type);

// The storage type of a floating tensor; an error naming `what` for any other dtype.
DType dtype_of(const Tensor& t, const char* what);
// float64 for float64, else float32: the type of weights, h, logits.
inline ScalarType acc_type(DType type) { return type == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// The device that all tensors of a call share.
struct Place {
  int32_t type, index;
  bool operator==(const Place& o) const { return type == o.type && index == o.index; }
};
Place place_of(const Tensor& t);

// Errors unless t has this shape (-1: any size) and, where given, this dtype, and is where the others are.
void check_tensor(const Tensor& t, const char* what, const Place& place, std::initializer_list<int64_t> shape,
                  std::optional<ScalarType> type = std::nullopt);

inline bool rows_are_dense(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; }
// t, or a copy of it whose rows (whole of it, for `dense`) are contiguous.
Tensor with_dense_rows(const Tensor& t);
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
// [..., n] as [T, n]; and [T, n] with the leading dimensions of x.
Tensor as_rows(const Tensor& t, const char* what);
Tensor with_leading(const Tensor& rows, const Tensor& x);
// Elements from one row to the next of a 2-D tensor with dense rows.
inline int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

// Uninitialised, contiguous, from torch's allocator.
Tensor empty(const Place& place, std::initializer_list<int64_t> shape, ScalarType type);

template <class T>
inline T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace moa
