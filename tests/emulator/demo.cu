// The emulator's own kernel, for its tests: everything a real one uses, in the smallest form.
//
//   y = x w^T     x [m, k], w [n, k] of T, y [m, n] float32;  k a multiple of 8
//
// One warp per block owns a 16 x 8 tile of y and walks k in steps of 16, the next step's copies under way.
#include "demo.h"

#include "common/device.cuh"

namespace moa {
namespace {

constexpr int kM = 16, kN = 8, kK = 16, kStages = 2;
constexpr int kRow = kK + 8;  // 48 bytes: eight rows of ldmatrix fall into different banks
static_assert(kRow % 8 == 0, "rows stay 16-byte aligned");

// Rows of 16 elements, 16 bytes a lane; what lies outside is zero.
template <class T>
__device__ __forceinline__ void copy_rows(T* tile, const T* from, int rows, int first_row, int64_t all_rows, int64_t k0,
                                          int64_t k) {
  for (int i = threadIdx.x; i < rows * 2; i += kWarp) {
    const int row = i / 2, column = i % 2 * 8;
    const bool valid = first_row + row < all_rows && k0 + column < k;
    cp_async_16(tile + row * kRow + column, from + (valid ? (first_row + row) * k + k0 + column : 0), valid);
  }
}

template <class T>
__global__ void __launch_bounds__(kWarp) demo_kernel(DemoParams p) {
  MOA_DYNAMIC_SHARED(T, x_tiles);               // [kStages][kM][kRow]
  MOA_SHARED(T, w_tiles, kStages * kN * kRow);  // [kStages][kN][kRow]
  const int lane = threadIdx.x, m0 = blockIdx.x * kM, n0 = blockIdx.y * kN;
  const int64_t steps = (p.k + kK - 1) / kK;

  const auto copy_step = [&](int64_t step) {
    const int stage = static_cast<int>(step % kStages);
    if (step < steps) {
      copy_rows(x_tiles + stage * kM * kRow, static_cast<const T*>(p.x), kM, m0, p.m, step * kK, p.k);
      copy_rows(w_tiles + stage * kN * kRow, static_cast<const T*>(p.w), kN, n0, p.n, step * kK, p.k);
    }
    cp_async_commit();
  };

  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  copy_step(0);
  for (int64_t step = 0; step < steps; ++step) {
    copy_step(step + 1);
    cp_async_wait<1>();
    __syncwarp();
    const int stage = static_cast<int>(step % kStages);
    uint32_t a[4], b[2];
    ldmatrix_x4(a, x_tiles + (stage * kM + lane % 16) * kRow + lane / 16 * 8);
    ldmatrix_x2(b, w_tiles + (stage * kN + lane % 8) * kRow + lane / 8 % 2 * 8);
    mma_m16n8k16<T>(c, a, b);
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) {
    const int row = m0 + lane / 4 + i / 2 * 8, column = n0 + lane % 4 * 2 + i % 2;
    if (row < p.m && column < p.n) p.y[int64_t{row} * p.n + column] = c[i];
  }
}

// counts[v] += how often v < values occurs in ids; a histogram per block in shared memory, and one warp's votes.
constexpr int kThreads = 128, kValues = 64;
__global__ void __launch_bounds__(kThreads) count_kernel(const int32_t* ids, int64_t n, int32_t* counts) {
  MOA_SHARED(int32_t, histogram, kValues);
  for (int v = threadIdx.x; v < kValues; v += kThreads) histogram[v] = 0;
  __syncthreads();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int32_t id = i < n ? ids[i] : -1;
  const unsigned same = __match_any_sync(kFullMask, id);
  if (id >= 0 && __ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x % kWarp)) {
    atomicAdd(&histogram[id], __popc(same));
  }
  __syncthreads();
  for (int v = threadIdx.x; v < kValues; v += kThreads) {
    if (histogram[v] != 0) atomicAdd(&counts[v], histogram[v]);
  }
}

// y[i] = the sum of row i of x [m, k] float32: rows in work memory, padded to whole 16 bytes; a thread takes the next.
constexpr int kChunk = 4;  // elements
int64_t padded_width(int64_t k) { return (k + kChunk - 1) / kChunk * kChunk; }
__global__ void __launch_bounds__(kThreads)
    pad_kernel(const float* x, int64_t m, int64_t k, int64_t padded, float* rows) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = i / padded, column = i % padded;
  if (row < m) rows[i] = column < k ? x[row * k + column] : 0.0f;
}
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(const float* rows, int64_t m, int64_t k, int64_t padded, uint32_t* taken, float* y) {
  MOA_SHARED(float, chunks, kThreads* kChunk);
  float* const mine = chunks + threadIdx.x * kChunk;
  for (int64_t row; (row = atomicAdd(taken, 1u)) < m;) {
    float sum = 0.0f;
    for (int64_t j = 0; j < k; j += kChunk) {
      cp_async_16(mine, rows + row * padded + j, true);
      cp_async_commit();
      cp_async_wait<0>();
      for (int i = 0; i < kChunk && j + i < k; ++i) sum += mine[i];
    }
    y[row] = sum;
  }
}

template <class T>
cudaError_t launch_demo(const DemoParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.m + kM - 1) / kM), static_cast<unsigned>((p.n + kN - 1) / kN));
  return MOA_LAUNCH(demo_kernel<T>, grid, kWarp, kStages * kM * kRow * sizeof(T), stream, p);
}

}  // namespace

cudaError_t demo_cuda(const DemoParams& p, cudaStream_t stream) {
  return p.type == DType::bf16 ? launch_demo<__nv_bfloat16>(p, stream) : launch_demo<__half>(p, stream);
}

cudaError_t count_cuda(const int32_t* ids, int64_t n, int32_t* counts, cudaStream_t stream) {
  return MOA_LAUNCH(count_kernel, static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, 0, stream, ids, n,
                    counts);
}

size_t row_sums_work(int64_t m, int64_t k) { return static_cast<size_t>(m * padded_width(k) + 1) * 4; }

cudaError_t row_sums_cuda(const float* x, int64_t m, int64_t k, float* y, void* work, cudaStream_t stream) {
  const int64_t padded = padded_width(k);
  auto* const rows = static_cast<float*>(work);
  auto* const taken = reinterpret_cast<uint32_t*>(rows + m * padded);
  cudaError_t error = cudaMemsetAsync(taken, 0, sizeof *taken, stream);
  const auto blocks = static_cast<unsigned>((m * padded + kThreads - 1) / kThreads);
  if (error == cudaSuccess) error = MOA_LAUNCH(pad_kernel, blocks, kThreads, 0, stream, x, m, k, padded, rows);
  if (error != cudaSuccess) return error;
  return MOA_LAUNCH(row_sums_kernel, 2, kThreads, 0, stream, rows, m, k, padded, taken, y);
}

}  // namespace moa
