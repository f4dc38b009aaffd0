// The router's backward where every logit has a gradient: dx[t] += sum over e of dz[t][e] W[e], in place, and
// dW[e] = sum over t of dz[t][e] x[t].
//
//   dz [tokens, experts], W [experts, in], dW in the accumulator's type; x, dx [tokens, in]
//
// dW is a gram of one segment (gram.cu). dx in float32 and float64 is expand's form by multiply-adds (expand.cu); under
// 16-bit x it is here, on tensor cores: a block owns 64 tokens and 64 columns, a warp 16 tokens, and takes 16 experts at
// a time. Both operands are float32 and cut into two terms of T each: hi hi + hi mid + mid hi is off by about 2^-16
// (bfloat16) or 2^-22 (float16) of the product, far below the rounding of dx itself. float16 lacks the range: each token's
// and each column's 16 values are scaled by a power of two, undone as they are added.
//
// A column of the product is not the same column of dx: a thread's four fragments are laid so that they are eight
// neighbours, which it loads and stores as 16 bytes. Each element of dx has one owner: no atomics, bitwise reproducible.
//
// Limits: any number of experts and columns; rows of dx that are not whole 16-byte chunks are taken by element.
#include "lora/combine.cuh"

namespace moa {
namespace {

using plan_cuda::kRouterColumns;
using plan_cuda::kRouterExperts;
using plan_cuda::kRouterRows;
using plan_cuda::kRouterThreads;

// The column that row n of the staged W holds.
__device__ __forceinline__ int column_of(int n) { return n / 32 * 32 + n / 2 % 4 * 8 + n / 8 % 4 * 2 + n % 2; }

// Eight values as two terms into row `row` of [rows][hi 16 | mid 16]; two neighbouring lanes have a row. A whole warp.
template <class T>
__device__ __forceinline__ void stage_terms(T* to, float* undo, int row, const float (&values)[8]) {
  const int half = threadIdx.x % 2;
  float power = 1.0f;
  if constexpr (std::is_same<T, __half>::value) {
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fabsf(values[i]) > top ? fabsf(values[i]) : top;
    const float other = __shfl_xor_sync(kFullMask, top, 1);
    power = half_scale(other > top ? other : top);
    if (half == 0) undo[row] = 1.0f / power;
  }
  alignas(16) T hi[8], mid[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    hi[i] = from_acc<T>(values[i] * power);
    mid[i] = from_acc<T>(values[i] * power - to_acc(hi[i]));
  }
  *reinterpret_cast<uint4*>(to + chunk_at(row, half)) = *reinterpret_cast<const uint4*>(hi);
  *reinterpret_cast<uint4*>(to + chunk_at(row, 2 + half)) = *reinterpret_cast<const uint4*>(mid);
}

template <class T>
__global__ void __launch_bounds__(kRouterThreads, 3) router_dx_mma(const RouterBackwardParams p, const bool direct) {
  constexpr int kFrags = kRouterColumns / 8;
  static_assert(kRouterRows == 64 && kFrags == 8 && kRouterExperts == 16 && kRouterThreads == 128, "numbering below");
  MOA_SHARED(T, dz, kRouterRows * 64);    // [tokens][hi 16 | mid 16 experts]
  MOA_SHARED(T, w, kRouterColumns * 64);  // [columns][the same]
  MOA_SHARED(float, undo_row, kRouterRows);
  MOA_SHARED(float, undo_column, kRouterColumns);
  const unsigned across = static_cast<unsigned>(plan_cuda::ceil_div(p.in, kRouterColumns));
  const int64_t token = blockIdx.x / across * static_cast<int64_t>(kRouterRows);
  const int64_t c0 = blockIdx.x % across * static_cast<int64_t>(kRouterColumns);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, staged = spread(threadIdx.x / 2);
  T* const dx = static_cast<T*>(p.dx);
  // This thread's: two tokens, and in each two groups of eight columns.
  const int64_t row = token + 16 * warp + lane / 4, column = c0 + 8 * (lane % 4);
  // Eight experts of a token and of a column, loaded while those of before are multiplied.
  const int64_t own_row = token + staged, own_column = c0 + column_of(staged);
  float z[8], weight[8];
  const float* from = static_cast<const float*>(p.dz) + own_row * p.experts + threadIdx.x % 2 * 8;
  const float* w_from = static_cast<const float*>(p.weight) + threadIdx.x % 2 * 8 * p.in + own_column;
  const auto load = [&](int64_t e) {
    const int left = static_cast<int>(clamp(p.experts - e - threadIdx.x % 2 * 8, 0, 8));
    const int there = own_row < p.tokens ? left : 0, w_there = own_column < p.in ? left : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      z[i] = i < there ? from[i] : 0.0f;
      weight[i] = i < w_there ? *w_from : 0.0f;
      w_from += p.in;
    }
    from += kRouterExperts;
    w_from += (kRouterExperts - 8) * p.in;
  };
  load(0);
  uint4 before[2][2];
  float total[kFrags][4] = {};
  for (int64_t e0 = 0; e0 < p.experts; e0 += kRouterExperts) {
    __syncthreads();  // all have left the experts of before
    stage_terms(dz, undo_row, staged, z);
    stage_terms(w, undo_column, staged, weight);
    __syncthreads();
    if (e0 + kRouterExperts < p.experts) {
      load(e0 + kRouterExperts);
    } else if (direct) {  // dx itself, under way with the last product
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t t = row + i / 2 * 8, c = column + i % 2 * 32;
        if (t < p.tokens && c < p.in) before[i / 2][i % 2] = *reinterpret_cast<const uint4*>(dx + t * p.in + c);
      }
    }
    float undo[2] = {1.0f, 1.0f};
    if constexpr (std::is_same<T, __half>::value) {
      undo[0] = undo_row[16 * warp + lane / 4];
      undo[1] = undo_row[16 * warp + lane / 4 + 8];
    }
    uint32_t hi[4], mid[4];
    ldmatrix_x4(hi, dz + chunk_at(16 * warp + lane % 16, lane / 16));
    ldmatrix_x4(mid, dz + chunk_at(16 * warp + lane % 16, 2 + lane / 16));
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
      __syncwarp();   // later columns are not loaded ahead: their registers would not be there
      uint32_t b[4];  // hi, mid
      ldmatrix_x4(b, w + chunk_at(8 * f + lane % 8, lane / 8));
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      mma_m16n8k16<T>(sum, mid, {b[0], b[1]});
      mma_m16n8k16<T>(sum, hi, {b[2], b[3]});
      mma_m16n8k16<T>(sum, hi, {b[0], b[1]});
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same<T, __half>::value)
          sum[i] = sum[i] * undo[i / 2] * undo_column[8 * f + 2 * (lane % 4) + i % 2];
        total[f][i] += sum[i];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, group = i % 2;
    const int64_t t = row + 8 * half, c = column + 32 * group;
    if (t >= p.tokens) continue;
    T* const at = dx + t * p.in + c;
    const auto more = [&](int q) { return total[4 * group + q / 2][2 * half + q % 2]; };
    if (direct) {
      if (c >= p.in) continue;
      const uint32_t old[4] = {before[half][group].x, before[half][group].y, before[half][group].z,
                               before[half][group].w};
      uint32_t sums[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float2 pair = unpack2<T>(old[q]);
        sums[q] = pack2<T>(pair.x + more(2 * q), pair.y + more(2 * q + 1));
      }
      *reinterpret_cast<uint4*>(at) = make_uint4(sums[0], sums[1], sums[2], sums[3]);
    } else {
#pragma unroll
      for (int q = 0; q < 8; ++q)
        if (c + q < p.in) at[q] = from_acc<T>(to_acc(at[q]) + more(q));
    }
  }
}

template <class T>
cudaError_t launch_dx(const RouterBackwardParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.in == 0) return cudaSuccess;
  // All in the grid's x: its y ends at 65535.
  const int64_t grid = plan_cuda::ceil_div(p.in, kRouterColumns) * plan_cuda::ceil_div(p.tokens, kRouterRows);
  return MOA_LAUNCH((router_dx_mma<T>), static_cast<unsigned>(grid), kRouterThreads, 0, stream, p,
                    chunks(p.dx, p.in, 2));
}

cudaError_t launch_dx(const RouterBackwardParams& p, cudaStream_t stream) {
  if (p.dx == nullptr) return cudaSuccess;
  switch (p.x_type) {
    case DType::bf16: return launch_dx<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_dx<__half>(p, stream);
    default: return router_dx_cuda(p, stream);
  }
}

}  // namespace

size_t router_backward_work(const RouterBackwardParams& p) { return p.d_weight == nullptr ? 0 : router_gram_work(p); }
cudaError_t router_backward_cuda(const RouterBackwardParams& p, void* work, cudaStream_t stream) {
  const cudaError_t error = launch_dx(p, stream);
  return error != cudaSuccess || p.d_weight == nullptr ? error : router_gram_cuda(p, work, stream);
}

}  // namespace moa
