#include "common/scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace moa {
namespace {

// Under AddressSanitizer every request gets a block of its own, full of NaN: what runs over it, outlives it or is read
// before it is written shows.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kChecked = true;
constexpr size_t kPage = 64;
#else
constexpr bool kChecked = false;
constexpr size_t kPage = 4096;
#endif

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
  if (kChecked || arena.size[i] < bytes) {
    std::free(arena.data[i]);
    arena.size[i] = 0;
    const size_t spare = kChecked ? 1 : bytes / 4, rounded = (bytes + spare + kPage - 1) / kPage * kPage;
    arena.data[i] = std::aligned_alloc(kPage, rounded);
    if (arena.data[i] == nullptr) throw std::bad_alloc();
    arena.size[i] = rounded;
    if (kChecked) std::memset(arena.data[i], 0xff, rounded);
  }
  return arena.data[i];
}

}  // namespace moa
