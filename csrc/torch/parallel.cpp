// The kernels' tasks on torch's own threads: torch.set_num_threads holds here too.
#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace moa {

void parallel_run(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace moa
