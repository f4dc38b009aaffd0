// Every word of csrc/common/device.cuh and of CUDA that kernels use, once, so that one test shows that nvcc and the
// emulator know it, and what it does.
#include "vocabulary.h"

#include "common/device.cuh"

namespace moa {
namespace {

__global__ void __launch_bounds__(kWarp) lanes_kernel(const int32_t* __restrict__ in, uint32_t* __restrict__ out) {
  const int lane = threadIdx.x;
  const int32_t v = __ldg(in + lane);
  int row = 0;
  const auto put = [&](uint32_t result) { out[row++ * kWarp + lane] = result; };
  put(__shfl_sync(kFullMask, v, lane + 3));
  put(__shfl_sync(kFullMask, v, 5, 8));
  put(__shfl_up_sync(kFullMask, v, 2));
  put(__shfl_up_sync(kFullMask, v, 3, 16));
  put(__shfl_down_sync(kFullMask, v, 5));
  put(__shfl_down_sync(kFullMask, v, 1, 4));
  put(__shfl_xor_sync(kFullMask, v, 9));
  put(__shfl_xor_sync(kFullMask, v, 8, 8));
  put(__ballot_sync(kFullMask, v & 1));
  put(__any_sync(kFullMask, v == 3));
  put(__all_sync(kFullMask, v >= -8));
  put(__match_any_sync(kFullMask, v));
  put(__match_any_sync(kFullMask, static_cast<unsigned long long>(v & 1) << 40));
  put(__reduce_add_sync(kFullMask, v));
  put(__reduce_min_sync(kFullMask, v));
  put(__reduce_max_sync(kFullMask, v));
  put(__reduce_min_sync(kFullMask, static_cast<uint32_t>(v)));
  put(__reduce_max_sync(kFullMask, static_cast<uint32_t>(v)));
  put(__reduce_and_sync(kFullMask, static_cast<uint32_t>(v) | 0x100u));
  put(__reduce_or_sync(kFullMask, static_cast<uint32_t>(v) & 0xffu));
  // Half of the warp here, half there.
  uint32_t half;
  if (lane < 16) {
    half = __shfl_xor_sync(0x0000ffffu, v, 1);
  } else {
    half = __ballot_sync(0xffff0000u, v & 2);
  }
  put(half);
  __syncwarp();
  put(__float_as_uint(warp_sum(static_cast<float>(v))));
  put(__float_as_uint(warp_sum<8>(static_cast<float>(v))));
  put(warp_max(v));
  put(warp_max<4>(v));
  put(warp_min(v));
  put(warp_min<16>(v));
}

__global__ void __launch_bounds__(kWarp) bits_kernel(const uint32_t* __restrict__ in, uint32_t* __restrict__ out) {
  const int lane = threadIdx.x;
  const uint32_t v = in[lane], w = in[(lane + 1) % kWarp];
  const uint64_t vw = uint64_t{v} << 32 | w;
  int row = 0;
  const auto put = [&](uint32_t result) { out[row++ * kWarp + lane] = result; };
  put(__popc(v));
  put(__popcll(vw));
  put(__ffs(static_cast<int>(v)));
  put(__ffsll(static_cast<long long>(vw)));
  put(__clz(static_cast<int>(v)));
  put(__clzll(static_cast<long long>(vw)));
  put(__brev(v));
  put(__byte_perm(v, w, 0x5410));
  put(__byte_perm(v, w, 0x3276));
  put(__funnelshift_l(v, w, lane));
  put(__funnelshift_r(v, w, lane));
  put(__umulhi(v, w));
  put(min(static_cast<int>(v), static_cast<int>(w)));
  put(max(v, w));
  put(__float_as_uint(__fmaf_rn(static_cast<float>(v), 0.5f, static_cast<float>(w))));
}

__global__ void __launch_bounds__(kWarp)
    ldmatrix_kernel(const uint16_t* __restrict__ from, uint32_t* __restrict__ out) {
  MOA_SHARED(uint16_t, tile, 32 * 8);
  const int lane = threadIdx.x;
  cp_async_16(tile + lane * 8, from + lane * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t r[4], s[2];
  int row = 0;
  const auto put = [&](uint32_t result) { out[row++ * kWarp + lane] = result; };
  ldmatrix_x4(r, tile + lane * 8);
  for (int i = 0; i < 4; ++i) put(r[i]);
  ldmatrix_x4_trans(r, tile + lane * 8);
  for (int i = 0; i < 4; ++i) put(r[i]);
  ldmatrix_x2(s, tile + lane % 16 * 8);
  for (int i = 0; i < 2; ++i) put(s[i]);
  ldmatrix_x2_trans(s, tile + lane % 16 * 8);
  for (int i = 0; i < 2; ++i) put(s[i]);
}

// Fragments straight from global memory, by the layouts in device.cuh.
template <class T>
__global__ void __launch_bounds__(kWarp) mma_kernel(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  uint32_t left[4], right[2];
  if constexpr (std::is_same<T, float>::value) {
    for (int i = 0; i < 4; ++i) left[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) right[i] = to_tf32(b[(t + i * 4) * 8 + g]);
    mma_m16n8k8_tf32(sum, left, right);
  } else {
    for (int i = 0; i < 4; ++i) {
      const T* pair = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      left[i] = pack2<T>(to_acc(pair[0]), to_acc(pair[1]));
    }
    for (int i = 0; i < 2; ++i) {
      const T* pair = b + (2 * t + i * 8) * 8 + g;
      right[i] = pack2<T>(to_acc(pair[0]), to_acc(pair[8]));
    }
    mma_m16n8k16<T>(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T>
__global__ void __launch_bounds__(128)
    convert_kernel(const float* x, int64_t n, T* rounded, float* back, uint32_t* pairs, float* pairs_back) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 2;
  if (i >= n) return;
  for (int j = 0; j < 2; ++j) {
    rounded[i + j] = from_acc<T>(x[i + j]);
    back[i + j] = static_cast<float>(to_acc(rounded[i + j]));
  }
  if constexpr (sizeof(T) == 2) {
    pairs[i / 2] = pack2<T>(x[i], x[i + 1]);
    const float2 two = unpack2<T>(pairs[i / 2]);
    pairs_back[i] = two.x;
    pairs_back[i + 1] = two.y;
  }
}

__global__ void __launch_bounds__(64) atomics_kernel(uint32_t* v, unsigned long long* wide, int32_t* votes) {
  const unsigned i = threadIdx.x;
  atomicAdd(&v[0], i);
  atomicSub(&v[1], 1u);
  atomicMin(&v[2], i);
  atomicMax(&v[3], i);
  atomicAnd(&v[4], ~i);
  atomicOr(&v[5], i);
  atomicXor(&v[6], i);
  atomicInc(&v[7], 9u);
  atomicAdd(&wide[0], 1ull << 33);
  atomicExch(&wide[1], 7ull);
  atomicCAS(&wide[2], 0ull, 5ull);
  votes[i] = __syncthreads_count(i % 3 == 0);
  votes[64 + i] = __syncthreads_and(i < 64);
  votes[128 + i] = __syncthreads_or(i == 99);
}

constexpr int kSumThreads = 128;
static_assert(blocks_at_once(8, 1024) == 8 && blocks_at_once(8, 99 * 1024) < 3, "by shared memory, and no more");
__global__ void __launch_bounds__(kSumThreads, blocks_at_once(8, 1024))
    sum_kernel(const float* x, int64_t n, float* parts, unsigned* counter, float* sum) {
  MOA_SHARED(float, warps, kSumThreads / kWarp);
  MOA_SHARED(bool, last, 1);
  const auto block_sum = [&](float v) {  // in thread 0
    v = warp_sum(v);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = v;
    __syncthreads();
    float all = 0.0f;
    for (int w = 0; threadIdx.x == 0 && w < kSumThreads / kWarp; ++w) all += warps[w];
    return all;
  };
  int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i < n) prefetch_l2(x + i);
  keep(i);
  const float part = block_sum(i < n ? x[i] : 0.0f);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = part;
    last[0] = arrive(counter) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0]) return;
  float mine = 0.0f;
  for (unsigned p = threadIdx.x; p < gridDim.x; p += kSumThreads) mine += parts[p];
  const float all = block_sum(mine);
  if (threadIdx.x == 0) {
    *sum = all;
    *counter = 0;  // for the next launch
  }
}

// Blocks take items in turn: item i < n is y[i] = x[i]; item n + i is z[i] = y[0] + .. + y[n - 1] + i, once all y are there.
__global__ void __launch_bounds__(kWarp) relay_kernel(const float* x, int n, float* y, float* z, uint32_t* counters) {
  uint32_t* const taken = counters;
  uint32_t* const done = counters + 1;
  MOA_SHARED(int, item, 1);
  for (;;) {
    if (threadIdx.x == 0) item[0] = static_cast<int>(atomicAdd(taken, 1u));
    __syncthreads();
    const int i = item[0];
    if (i >= 2 * n) return;
    if (i < n) {
      if (static_cast<int>(threadIdx.x) == i % kWarp) y[i] = x[i];
      __syncthreads();
      if (threadIdx.x == 0) arrive(done);
    } else {
      if (threadIdx.x == 0) await(done, static_cast<uint32_t>(n));
      __syncthreads();
      float sum = 0.0f;
      for (int j = threadIdx.x; j < n; j += kWarp) sum += y[j];
      sum = warp_sum(sum);
      if (threadIdx.x == 0) z[i - n] = sum + static_cast<float>(i - n);
    }
    __syncthreads();  // all have read the item
  }
}

// z[i] = x[i] + y[n - 1 - i], 0 behind n; the launch in front, which need not have ended before it is awaited, makes y = 2 x.
__global__ void __launch_bounds__(kWarp) double_kernel(const float* x, int64_t n, float* y) {
  next_may_begin();
  const int64_t i = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  if (i < n) y[i] = 2.0f * x[i];
}
__global__ void __launch_bounds__(kWarp) early_kernel(const float* x, int64_t n, const float* y, float* z) {
  const int64_t i = 4 * (int64_t{blockIdx.x} * kWarp + threadIdx.x);
  const uint4 four = load_once(x + (i < n ? i : 0), i < n);
  await_launch();
  const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
  for (int j = 0; j < 4; ++j) z[i + j] = __uint_as_float(bits[j]) + (i + j < n ? y[n - 1 - i - j] : 0.0f);
}

template <class T>
cudaError_t launch_mma(const void* a, const void* b, float* c, cudaStream_t stream) {
  return MOA_LAUNCH(mma_kernel<T>, 1, kWarp, 0, stream, static_cast<const T*>(a), static_cast<const T*>(b), c);
}

}  // namespace

cudaError_t lanes_cuda(const int32_t* in, uint32_t* out, cudaStream_t stream) {
  return MOA_LAUNCH(lanes_kernel, 1, kWarp, 0, stream, in, out);
}
cudaError_t bits_cuda(const uint32_t* in, uint32_t* out, cudaStream_t stream) {
  return MOA_LAUNCH(bits_kernel, 1, kWarp, 0, stream, in, out);
}
cudaError_t ldmatrix_cuda(const uint16_t* tile, uint32_t* out, cudaStream_t stream) {
  return MOA_LAUNCH(ldmatrix_kernel, 1, kWarp, 0, stream, tile, out);
}
cudaError_t mma_cuda(DType type, const void* a, const void* b, float* c, cudaStream_t stream) {
  if (type == DType::f32) return launch_mma<float>(a, b, c, stream);
  if (type == DType::bf16) return launch_mma<__nv_bfloat16>(a, b, c, stream);
  return launch_mma<__half>(a, b, c, stream);
}
cudaError_t convert_cuda(DType type, const float* x, int64_t n, void* rounded, float* back, uint32_t* pairs,
                         float* pairs_back, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((n / 2 + 127) / 128);
  if (type == DType::bf16) {
    return MOA_LAUNCH(convert_kernel<__nv_bfloat16>, blocks, 128, 0, stream, x, n, static_cast<__nv_bfloat16*>(rounded),
                      back, pairs, pairs_back);
  }
  if (type == DType::f16) {
    return MOA_LAUNCH(convert_kernel<__half>, blocks, 128, 0, stream, x, n, static_cast<__half*>(rounded), back, pairs,
                      pairs_back);
  }
  return MOA_LAUNCH(convert_kernel<double>, blocks, 128, 0, stream, x, n, static_cast<double*>(rounded), back, pairs,
                    pairs_back);
}
cudaError_t atomics_cuda(uint32_t* v, unsigned long long* wide, int32_t* votes, cudaStream_t stream) {
  return MOA_LAUNCH(atomics_kernel, 1, 64, 0, stream, v, wide, votes);
}
cudaError_t sum_cuda(const float* x, int64_t n, float* parts, unsigned* counter, float* sum, cudaStream_t stream) {
  return MOA_LAUNCH(sum_kernel, static_cast<unsigned>((n + kSumThreads - 1) / kSumThreads), kSumThreads, 0, stream, x,
                    n, parts, counter, sum);
}
cudaError_t early_cuda(const float* x, int64_t n, float* y, float* z, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((n + 4 * kWarp - 1) / (4 * kWarp));
  const cudaError_t error = MOA_LAUNCH(double_kernel, 4 * blocks, kWarp, 0, stream, x, n, y);
  return error != cudaSuccess ? error : MOA_LAUNCH_EARLY(early_kernel, blocks, kWarp, 0, stream, x, n, y, z);
}
cudaError_t relay_cuda(const float* x, int n, int blocks, float* y, float* z, uint32_t* counters, cudaStream_t stream) {
  return MOA_LAUNCH(relay_kernel, static_cast<unsigned>(blocks), kWarp, 0, stream, x, n, y, z, counters);
}

}  // namespace moa
