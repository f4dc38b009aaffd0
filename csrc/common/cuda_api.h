// cudaError_t, cudaStream_t and dim3 for launchers' declarations, without device code: from the CUDA toolkit, or, with
// MOA_EMULATE, from the emulator that runs kernels on a CPU (tests/emulator/).
#pragma once
#ifdef MOA_EMULATE
#include "emulator/host_api.h"
#else
#include <cuda_runtime_api.h>
#endif
