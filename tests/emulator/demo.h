// The emulator's own kernels: see demo.cu.
#pragma once
#include "common/cuda_api.h"
#include "common/types.h"

namespace moa {

struct DemoParams {
  DType type;  // bf16 or f16
  int64_t m, n, k;
  const void *x, *w;
  float* y;
};

cudaError_t demo_cuda(const DemoParams& p, cudaStream_t stream);
cudaError_t count_cuda(const int32_t* ids, int64_t n, int32_t* counts, cudaStream_t stream);
size_t row_sums_work(int64_t m, int64_t k);
cudaError_t row_sums_cuda(const float* x, int64_t m, int64_t k, float* y, void* work, cudaStream_t stream);

}  // namespace moa
