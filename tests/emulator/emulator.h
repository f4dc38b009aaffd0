// Stands in for CUDA when csrc/**/*.cu is compiled by g++ with MOA_EMULATE: see __init__.py for what it can and cannot.
// Included by csrc/common/device.cuh alone.
#pragma once
#include "emulator/host_api.h"
#include "emulator/intrinsics.h"
#include "emulator/runtime.h"
#include "emulator/types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)

#define threadIdx (::emu::self->index)
#define blockIdx (::emu::block.index)
#define blockDim (::emu::block.size)
#define gridDim (::emu::block.grid)
constexpr int warpSize = 32;

#define MOA_SHARED(type, name, count) \
  static const char name##_site = 0;  \
  type(&name)[count] = *reinterpret_cast<type(*)[count]>(::emu::shared_array(&name##_site, #name, sizeof(type[count])))
#define MOA_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::emu::dynamic_shared())
#define MOA_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
  ::emu::launch(#kernel, kernel, dim3(grid), dim3(block), dynamic_bytes, stream, __VA_ARGS__)
#define MOA_LAUNCH_EARLY(kernel, grid, block, dynamic_bytes, stream, ...) \
  ::emu::launch_early(#kernel, kernel, dim3(grid), dim3(block), dynamic_bytes, stream, __VA_ARGS__)

#include "emulator/collectives.h"
#include "emulator/fragments.h"
