// cudaError_t, cudaStream_t and dim3 for launchers' declarations, without device code: from the CUDA toolkit, or, with
// MOA_EMULATE, from the emulator that runs kernels on a CPU (tests/emulator/).
#pragma once
#ifdef MOA_EMULATE
#include "emulator/host_api.h"
#else
#include <cuda_runtime_api.h>
#endif
#include <cstddef>

namespace moa {

// A block may have 48 KB of shared memory, static and dynamic together, and more only if the launch asks for it. One with
// more dynamic memory than kSharedUnasked asks; so a kernel that has some may have 8 KB of static arrays beside it. It
// asks for kSharedMost whatever it needs, because the limit is the kernel's: another thread may be about to launch it
// with more. That is what every architecture we ship has (sm_86, sm_89 and sm_120 the least) beside 128 static bytes.
constexpr std::size_t kSharedUnasked = 40 * 1024;
constexpr std::size_t kSharedMost = 99 * 1024 - 128;

}  // namespace moa
