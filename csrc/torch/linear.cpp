#include "torch/linear.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "isa/table.h"
#include "torch/arguments.h"

namespace moa {
namespace {

// W^T, a view made without the dispatcher, whose code the weights of the call before have swept from the caches.
Tensor transposed(const Tensor& weight) {
  const int64_t sizes[2] = {weight.size(1), weight.size(0)}, strides[2] = {weight.stride(1), weight.stride(0)};
  AtenTensorHandle view;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(weight.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
}

// How many rows of y are the bias, or zero without one: of bits, where U is as wide as an element.
template <class U>
int64_t rows_of_bias(const Tensor& y, const OptionalTensor& bias) {
  const U* row = data<U>(y);
  const U* start = bias.has_value() ? data<U>(*bias) : nullptr;
  const int64_t tokens = y.size(0), out = y.size(1);
  auto zero = [](U bits) { return static_cast<U>(bits << 1) == 0; };  // of either sign
  int64_t rows = 0;
  for (int64_t t = 0; t < tokens; ++t, row += out) {
    int64_t i = 0;
    for (; i < out; ++i) {
      const U want = start != nullptr ? start[i] : U(0);
      if (row[i] != want && !(zero(row[i]) && zero(want))) break;
    }
    rows += i == out;
  }
  return rows;
}

int64_t rows_of_bias(const Tensor& y, const OptionalTensor& bias) {
  switch (dtype_of(y, "y")) {
    case DType::f64: return rows_of_bias<uint64_t>(y, bias);
    case DType::f32: return rows_of_bias<uint32_t>(y, bias);
    default: return rows_of_bias<uint16_t>(y, bias);
  }
}

}  // namespace

bool own_linear(const Tensor& x, const Tensor& weight) {
  return rows_are_dense(x) && rows_are_dense(weight) &&
         kernels().own_linear(dtype_of(x, "x"), x.size(0), x.size(1), weight.size(0));
}

void library_linear(const Tensor& y, const OptionalTensor& start, const Tensor& x, const Tensor& weight) {
  const Tensor columns = transposed(weight);
  if (start.has_value()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), start->get(), x.get(), columns.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), x.get(), columns.get()));
  }
}

// y += x W^T, where y holds the bias and the mixture. Where some token has no mixture, as all have in a layer whose
// adapters are fresh and those of the base model alone in a batch by id, the library multiplies: such a token's row is
// F.linear's own, bit for bit.
static void add_linear(const Tensor& y, const OptionalTensor& bias, const Tensor& x, const Tensor& weight) {
  if (!own_linear(x, weight)) return library_linear(y, y, x, weight);
  const int64_t rows = rows_of_bias(y, bias);
  if (rows == y.size(0)) return library_linear(y, bias, x, weight);
  if (rows > 0) return library_linear(y, y, x, weight);
  kernels().linear(linear_params(y, x, weight));
}

void mixture_and_linear(ForwardParams* p, const Tensor& y, const Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias) {
  const bool half = p->x_type == DType::bf16 || p->x_type == DType::f16;
  const bool linear_first = half && weight.has_value() && p->base == nullptr && !own_linear(x, *weight);
  if (linear_first) {
    library_linear(y, bias, x, *weight);
    p->base = p->y;
    p->ldbase = p->out;
    p->bias = nullptr;
  }
  kernels().forward(*p);
  if (!weight.has_value() || linear_first) return;
  if (p->base == nullptr) {
    add_linear(y, bias, x, *weight);
  } else {
    library_linear(y, y, x, *weight);
  }
}

void add_linear_backward(const Tensor& grad_x, const Tensor& grad_y, const Tensor& weight) {
  if (rows_are_dense(weight)) {
    LinearBackwardParams p{};
    p.type = dtype_of(grad_y, "grad_y");
    p.tokens = grad_y.size(0);
    p.in = weight.size(1);
    p.out = weight.size(0);
    p.dy = data<void>(grad_y);
    p.lddy = row_stride(grad_y);
    p.weight = data<void>(weight);
    p.ldw = row_stride(weight);
    p.dx = data<void>(grad_x);
    if (kernels().linear_backward(p)) return;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(grad_x.get(), grad_x.get(), grad_y.get(), weight.get(), 1.0, 1.0));
}

bool own_linear_cpu(const Tensor& x, const Tensor& weight) {
  check_tensor(x, "x", place_of(x), {-1, -1});
  check_tensor(weight, "weight", place_of(x), {-1, x.size(1)}, x.scalar_type());
  return own_linear(x, weight);
}

}  // namespace moa
