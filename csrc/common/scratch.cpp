#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace moa {
namespace {

struct Arena {
  void* data[static_cast<int>(Scratch::count)] = {};
  size_t size[static_cast<int>(Scratch::count)] = {};
  ~Arena() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void* scratch_bytes(Scratch slot, size_t bytes) {
  thread_local Arena arena;
  const int i = static_cast<int>(slot);
  if (arena.size[i] < bytes) {
    std::free(arena.data[i]);
    arena.size[i] = 0;
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    arena.data[i] = std::aligned_alloc(4096, rounded);
    if (arena.data[i] == nullptr) throw std::bad_alloc();
    arena.size[i] = rounded;
  }
  return arena.data[i];
}

}  // namespace moa
