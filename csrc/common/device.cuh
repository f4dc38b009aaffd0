// The device vocabulary: everything a kernel needs beyond CUDA C++ itself, and all inline PTX of the library.
//
//   shared memory    MOA_SHARED(type, name, count)         static, 16-byte aligned; name is an array
//                    MOA_DYNAMIC_SHARED(type, name)        the launch's dynamic part, 16-byte aligned; name is a pointer
//   launching        MOA_LAUNCH(kernel, grid, block, dynamic_bytes, stream, args...) -> cudaError_t
//                    write MOA_LAUNCH((kernel<A, B>), ...) for a template; an empty grid launches nothing
//                    MOA_LAUNCH_EARLY(...): the same, of a kernel that may begin before the one in front of it has ended
//   copies           cp_async_16(shared, global, valid), cp_async_commit(), cp_async_wait<N>()
//                    prefetch_l2(global): the line is on its way to L2
//                    load_once(global, valid): 16 bytes that this kernel reads once and nobody writes
//   fragments        ldmatrix_x2, ldmatrix_x4, and _trans
//   products         mma_m16n8k16<T>(c, a, b), T = __nv_bfloat16, __half;  mma_m16n8k8_tf32(c, a, b)
//   between blocks   arrive(counter), await(counter, value)
//   between launches next_may_begin(), await_launch()
//   registers        keep(v): v is in a register from here on, and not computed again where it is used
//   warps            warp_sum<W>(v), warp_max<W>(v), warp_min<W>(v): over W neighbouring lanes, every lane gets the result
//   elements         Acc<T>, to_acc(v), from_acc<T>(v), pack2<T>(lo, hi), unpack2<T>(bits)
//
// Compiled by nvcc this is real; compiled by g++ with MOA_EMULATE the same names come from tests/emulator/emulator.h,
// and the whole .cu file runs on a CPU. So kernels write no PTX, no __shared__ and no <<<>>> of their own.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cuda_api.h"

#ifdef MOA_EMULATE
#include "emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MOA_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define MOA_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char moa_shared[]; \
  type* const name = reinterpret_cast<type*>(moa_shared)
#define MOA_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
  ::moa::launch(kernel, dim3(grid), dim3(block), dynamic_bytes, stream, __VA_ARGS__)
#define MOA_LAUNCH_EARLY(kernel, grid, block, dynamic_bytes, stream, ...) \
  ::moa::launch_early(kernel, dim3(grid), dim3(block), dynamic_bytes, stream, __VA_ARGS__)
#endif

namespace moa {

// How many blocks of so many bytes of shared memory a kernel may count on being on a multiprocessor together, `wanted` at
// most: what __launch_bounds__ takes. With room for one alone, two blocks' worth of registers would be spills for nothing.
constexpr int blocks_at_once(int wanted, std::size_t bytes) {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
  constexpr std::size_t kAll = 100 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr std::size_t kAll = 164 * 1024;
#else
  constexpr std::size_t kAll = 228 * 1024;
#endif
  const int fit = static_cast<int>(kAll / (bytes + 1024));  // 1 KB of each is the system's
  return fit < 1 ? 1 : fit < wanted ? fit : wanted;
}

#ifndef MOA_EMULATE

inline bool is_empty(dim3 grid) { return grid.x == 0 || grid.y == 0 || grid.z == 0; }

// The attribute by which more shared memory is asked for is no stream operation, so graphs capture a launch with it.
inline cudaError_t ask_for_shared(const void* kernel, size_t dynamic_bytes) {
  if (dynamic_bytes <= kSharedUnasked) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kSharedMost));
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t stream,
                   const A&... args) {
  if (is_empty(grid)) return cudaSuccess;
  const cudaError_t asked = ask_for_shared(reinterpret_cast<const void*>(kernel), dynamic_bytes);
  if (asked != cudaSuccess) return asked;
  kernel<<<grid, block, dynamic_bytes, stream>>>(args...);
  return cudaGetLastError();
}

// Whether the current device runs code for sm_90 or later: code for earlier ones, on whatever card it runs, has no
// await_launch. All kernels are compiled for the same architectures, so each device is asked once.
inline cudaError_t may_launch_early(const void* kernel, bool* may) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // the version, or 0
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  int version = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (version == 0) {
    cudaFuncAttributes compiled;
    error = cudaFuncGetAttributes(&compiled, kernel);
    if (error != cudaSuccess) return error;
    version = compiled.ptxVersion;
    if (device < kDevices) known[device].store(version, std::memory_order_relaxed);
  }
  *may = version >= 90;
  return cudaSuccess;
}

// Programmatic dependent launch. In front of it on the stream must be a launch of ours, in the same call: of others nobody
// knows when they let it begin.
template <class... P, class... A>
cudaError_t launch_early(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t stream,
                         const A&... args) {
  if (is_empty(grid)) return cudaSuccess;
  const void* const function = reinterpret_cast<const void*>(kernel);
  bool may = false;
  cudaError_t error = may_launch_early(function, &may);
  if (error == cudaSuccess && !may) return launch(kernel, grid, block, dynamic_bytes, stream, args...);
  if (error == cudaSuccess) error = ask_for_shared(function, dynamic_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

// The launch behind this one may begin, as far as it is an early one, once all of this one's blocks have said so or ended.
__device__ __forceinline__ void next_may_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
// Of an early launch: waits until the one in front has ended. What that one writes is there then, for this thread and for
// whoever waits for it at a barrier; before, nobody may touch it. At least one thread of each block waits.
__device__ __forceinline__ void await_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, both 16-byte aligned, past L1. Not valid: zeros, and nothing is read, but the
// address must be aligned all the same. They are there after a cp_async_wait of this thread, and for the others after a
// barrier behind it.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of copies; an empty group counts too.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most N of this thread's newest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(global)));
}

// 16 bytes, 16-byte aligned, past L1 and by lines of 128: for streams, of memory that nobody writes while the kernel runs.
// Not valid: zeros, and nothing is read. Neither mma nor each other's order is changed: what is asked for early comes early.
__device__ __forceinline__ uint4 load_once(const void* global, bool valid) {
  uint4 v;
  asm volatile(
      "{\n"
      ".reg .pred valid;\n"
      "setp.ne.u32 valid, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@valid ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(__cvta_generic_to_global(global)), "r"(valid ? 1u : 0u));
  return v;
}

// 8x8 matrices of 16-bit elements, one per register. Lane l names row l % 8 of matrix l / 8: 16 bytes in shared memory,
// 16-byte aligned. Lane l receives elements 2(l % 4) and 2(l % 4) + 1 of row l / 4; with _trans, of column l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices: lanes 0 to 15 name the rows; the others' addresses are ignored, but must be valid.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b, float32 accumulators; a [16, 16] by rows, b [16, 8] by columns, c [16, 8]. With g = lane / 4, t = lane % 4:
//   a[0] = a(g, 2t..2t+1)   a[1] = a(g+8, 2t..)   a[2] = a(g, 2t+8..)   a[3] = a(g+8, 2t+8..)
//   b[0] = b(2t..2t+1, g)   b[1] = b(2t+8.., g)
//   c[0], c[1] = c(g, 2t..2t+1)                   c[2], c[3] = c(g+8, 2t..2t+1)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value, "bfloat16 or float16");
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// float32 cut to tf32 (10 bits of mantissa, nearest, ties away from zero), as the bits mma_m16n8k8_tf32 takes.
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(v));
  return bits;
}
// c += a b in tf32; a [16, 8], b [8, 8], c as above. With g = lane / 4, t = lane % 4:
//   a[0] = a(g, t)   a[1] = a(g+8, t)   a[2] = a(g, t+4)   a[3] = a(g+8, t+4)   b[0] = b(t, g)   b[1] = b(t+4, g)
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class V>
__device__ __forceinline__ void keep(V& v) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "a register or two");
  if constexpr (sizeof(V) == 4) {
    asm volatile("" : "+r"(v));
  } else {
    asm volatile("" : "+l"(v));
  }
}

// Counts one more at a counter in global memory, and says how many had come before. Whoever awaits this arrival, or
// arrives after it, sees what this thread has written, and what others had that it knows of by a barrier or likewise.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;\n"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
}
// Waits until the counter is `value` or more. Only for what blocks do that have begun: others may not before this one ends.
__device__ __forceinline__ void await(const uint32_t* counter, uint32_t value) {
  for (;;) {
    uint32_t now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n"
                 : "=r"(now)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    if (now >= value) return;
    __nanosleep(32);
  }
}

#endif  // MOA_EMULATE

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// Over each group of W neighbouring lanes of a whole warp; the order of the sum is fixed, and every lane gets it.
template <int W = kWarp, class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int step = W / 2; step > 0; step /= 2) v += __shfl_xor_sync(kFullMask, v, step);
  return v;
}
template <int W = kWarp, class T>
__device__ __forceinline__ T warp_max(T v) {
#pragma unroll
  for (int step = W / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kFullMask, v, step);
    v = other > v ? other : v;
  }
  return v;
}
template <int W = kWarp, class T>
__device__ __forceinline__ T warp_min(T v) {
#pragma unroll
  for (int step = W / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kFullMask, v, step);
    v = other < v ? other : v;
  }
  return v;
}

// What a stored T is accumulated in: double for double, float for the rest.
template <class T>
using Acc = std::conditional_t<std::is_same<T, double>::value, double, float>;

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }

// Rounded to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_acc(Acc<T> v) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same<T, __half>::value) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

// Two 16-bit elements in one register, the first in the low half: as mma fragments and 4-byte stores want them.
template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  uint32_t bits;
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);  // one instruction
    memcpy(&bits, &pair, sizeof bits);
  } else {
    static_assert(std::is_same<T, __half>::value, "bfloat16 or float16");
    const __half2 pair = __floats2half2_rn(lo, hi);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t bits) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  } else {
    static_assert(std::is_same<T, __half>::value, "bfloat16 or float16");
    __half2 pair;
    memcpy(&pair, &bits, sizeof bits);
    return __half22float2(pair);
  }
}

}  // namespace moa
