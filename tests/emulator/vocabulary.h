// Every word of csrc/common/device.cuh and of CUDA that kernels use, once: see vocabulary.cu.
#pragma once
#include "common/cuda_api.h"
#include "common/types.h"

namespace moa {

// One warp. in: 32 integers; out: a row of 32 per word, in the order of test_vocabulary.py.
cudaError_t lanes_cuda(const int32_t* in, uint32_t* out, cudaStream_t stream);
cudaError_t bits_cuda(const uint32_t* in, uint32_t* out, cudaStream_t stream);
// tile [32, 8] 16-bit elements; out [12, 32]: what each lane receives from ldmatrix x4, x4_trans, x2, x2_trans.
cudaError_t ldmatrix_cuda(const uint16_t* tile, uint32_t* out, cudaStream_t stream);
// c [16, 8] += a [16, K] b [K, 8]: K = 16 for bf16 and f16, 8 for f32, which is cut to tf32.
cudaError_t mma_cuda(DType type, const void* a, const void* b, float* c, cudaStream_t stream);
// n values of x to T and back; pairs: the same two by two, through pack2 and unpack2. n even.
cudaError_t convert_cuda(DType type, const float* x, int64_t n, void* rounded, float* back, uint32_t* pairs,
                         float* pairs_back, cudaStream_t stream);
// v [8] integers that 64 threads change; old values are not looked at. votes [3, 64].
cudaError_t atomics_cuda(uint32_t* v, unsigned long long* wide, int32_t* votes, cudaStream_t stream);
// sum[0] = x[0] + ... in a fixed order: a part per block, and the last block to arrive adds them. counter: 0, and 0 after.
cudaError_t sum_cuda(const float* x, int64_t n, float* parts, unsigned* counter, float* sum, cudaStream_t stream);
// y = 2 x, z[i] = x[i] + y[n - 1 - i], by two launches that overlap. n a multiple of 4; z [n filled up to 128], 0 behind n.
cudaError_t early_cuda(const float* x, int64_t n, float* y, float* z, cudaStream_t stream);
// y = x, z[i] = x[0] + .. + x[n - 1] + i, by blocks that wait for each other. counters: two, 0.
cudaError_t relay_cuda(const float* x, int n, int blocks, float* y, float* z, uint32_t* counters, cudaStream_t stream);

}  // namespace moa
