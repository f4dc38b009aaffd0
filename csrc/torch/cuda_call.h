// What stands around every launch: the device of the tensors made current, torch's stream of that device, work memory
// from torch's allocator, errors with words. Compiles with a CPU build of torch, and loads there.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "common/cuda_api.h"
#include "torch/tensors.h"

// These live in libtorch_cuda.so. Weak, because a CPU build of torch has none: then they are null.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
}

namespace moa {

// Turns an error of a launch into an exception that says what to do. `what` names the call.
void check_cuda(cudaError_t error, const char* what);
#define MOA_CUDA_CHECK(call) ::moa::check_cuda((call), #call)

// The device of `place` is current as long as this lives, and `stream` is torch's current one of it.
class CudaCall {
 public:
  explicit CudaCall(const Place& place);
  cudaStream_t stream() const { return stream_; }
  int32_t device() const { return place_.index; }
  // Uninitialised memory for the kernels of this call, null for none. The allocator may hand it out again as soon as
  // this is gone, but only to what comes later on the same stream; under graph capture it belongs to the graph.
  void* work(size_t bytes);

 private:
  Place place_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  OptionalTensor work_;
};

// While a call's stream is captured into a graph, a second one beside it: what is launched on it up to join() is a branch
// of the graph, and runs beside what the call's stream gets meanwhile. Else it is the call's stream: launching takes
// longer than the kernels of few tokens do then, and more calls would take longer still.
class Fork {
 public:
  explicit Fork(const CudaCall& call);
  cudaStream_t stream() const { return side_; }
  void join();  // what the call's stream gets from here on waits for the branch

 private:
  cudaStream_t main_, side_;
};

}  // namespace moa
