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

namespace {

// What `after` gets from now on waits for what `before` has got.
void order(cudaStream_t before, cudaStream_t after) {
  cudaEvent_t event = nullptr;
  MOA_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  const cudaError_t recorded = cudaEventRecord(event, before);
  const cudaError_t waits = recorded == cudaSuccess ? cudaStreamWaitEvent(after, event, 0) : recorded;
  cudaEventDestroy(event);
  MOA_CUDA_CHECK(waits);
}

// The capture that the stream takes part in; 0 for none.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  MOA_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

// This thread's second stream of a device, made at its first use and kept; null where there is none.
cudaStream_t second_stream(int32_t device) {
  constexpr int32_t kDevices = 64;
  static thread_local cudaStream_t streams[kDevices] = {};
  if (device < 0 || device >= kDevices) return nullptr;
  cudaStream_t& stream = streams[device];
  if (stream == nullptr) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // it is no part of the capture that is under way
    MOA_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    const cudaError_t made = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    MOA_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    MOA_CUDA_CHECK(made);
  }
  return stream;
}

}  // namespace

Fork::Fork(const CudaCall& call) : main_(call.stream()), side_(call.stream()) {
  const unsigned long long capture = capture_of(main_);
  if (capture == 0) return;
  const cudaStream_t second = second_stream(call.device());
  if (second == nullptr) return;
  const unsigned long long other = capture_of(second);  // a thread may capture two graphs in turns
  if (other != 0 && other != capture) return;
  side_ = second;
  order(main_, side_);
}

void Fork::join() {
  if (side_ != main_) order(side_, main_);
}

}  // namespace moa
#endif
