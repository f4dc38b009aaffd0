// Per-thread work memory that outlives a call, so that a decode step allocates nothing.
#pragma once
#include <cstddef>

namespace moa {

// One slot per use that can be alive at the same time on one thread. Slots from `call_first` on belong to the
// thread that called the operator and are shared, read-only or task by task, with its workers.
enum class Scratch : int {
  rows,
  panel,
  tile,
  convert,
  tiles,
  pointers,
  counts,
  call_first,
  call_second,
  call_pointers,
  call_groups,
  call_packed,
  call_dense,
  count
};

// At least `bytes` of 64-byte-aligned memory, contents undefined, valid until the same slot is asked for again.
void* scratch_bytes(Scratch slot, size_t bytes);

template <class T>
inline T* scratch(Scratch slot, size_t n) {
  return static_cast<T*>(scratch_bytes(slot, n * sizeof(T)));
}

}  // namespace moa
