#ifdef MOA_WITH_CUDA
#include "torch/cuda_call.h"

#include <string>

#include "moa_build_info.h"

namespace moa {

static std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return "; this binary holds kernels for " MOA_CUDA_ARCHS
             ": build it for this device (TORCH_CUDA_ARCH_LIST), or set MOA_CUDA=0 while building to do without";
    case cudaErrorInsufficientDriver:
      return "; the driver is older than CUDA " MOA_CUDA_VERSION
             ", which this binary was built with: update the driver, or build with the CUDA of your torch";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure: return "; an earlier kernel failed, maybe another's: run with CUDA_LAUNCH_BLOCKING=1";
    default: return "";
  }
}

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  STD_TORCH_CHECK(false, "moa_ops: ", what, ": ", cudaGetErrorString(error), advice(error));
}

static cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "moa_ops: this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

CudaCall::CudaCall(const Place& place) : place_(place), guard_(place.index), stream_(current_stream(place.index)) {}

void* CudaCall::work(size_t bytes) {
  if (bytes == 0) return nullptr;
  work_ = empty(place_, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  return data<void>(*work_);
}

}  // namespace moa
#endif
