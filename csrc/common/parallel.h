// How kernels run on several threads: fixed tasks, so that no result depends on the number of threads.
#pragma once
#include <cstdint>

namespace moa {

// Threads of the caller's pool.
int64_t thread_count();

// Splits tasks [0, n) over the caller's thread pool. Defined where the pool is known (csrc/torch/parallel.cpp).
void parallel_run(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// fn(task) for every task in [0, n). `wide` says whether the work is worth waking a second thread.
template <class F>
inline void parallel_tasks(int64_t n, bool wide, const F& fn) {
  if (!wide || n <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
  auto body = [](int64_t begin, int64_t end, void* context) {
    const F& f = *static_cast<const F*>(context);
    for (int64_t i = begin; i < end; ++i) f(i);
  };
  parallel_run(n, body, const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace moa
