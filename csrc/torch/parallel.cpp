// The kernels' tasks on torch's own threads: torch.set_num_threads holds here too.
#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace moa {

int64_t thread_count() { return torch::stable::get_num_threads(); }

// Each thread has a share of neighbouring tasks and, when it is through, takes from those of others: a thread that the
// system stops for a while delays one task, not its whole share.
void parallel_run(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kMaxShares = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Share shares[kMaxShares];
  int64_t count = thread_count();
  count = count < 1 ? 1 : count > kMaxShares ? kMaxShares : count;
  count = count > n ? n : count;
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next.store(n * i / count, std::memory_order_relaxed);
    shares[i].end = n * (i + 1) / count;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own)
      for (int64_t i = 0; i < count; ++i) {
        Share& share = shares[(own + i) % count];
        for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
          body(task, task + 1, context);
      }
  });
}

}  // namespace moa
