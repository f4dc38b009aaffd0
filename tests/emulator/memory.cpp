// Shared memory with poison and canaries, asynchronous copies, bank conflicts, and global memory of exact sizes.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>

#include "common/cuda_api.h"
#include "emulator/conflicts.h"
#include "emulator/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) static_cast<void>(0)
#endif

namespace emu {

// ---- Shared memory: every array between two gaps of canaries. The dynamic part comes last, as on the device.
namespace {

constexpr unsigned char kPoison = 0xff, kCanary = 0xa5;
constexpr size_t kGap = 128;

struct Array {
  const void* site;
  const char* name;
  size_t begin, bytes, gap;
};

struct Shared {
  alignas(1024) unsigned char bytes[kArena];
  std::vector<Array> arrays;
  size_t static_end, static_bytes;
};
std::unique_ptr<Shared> all_shared[kMaxResidents];
Shared& own() { return *all_shared[resident]; }

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

void* add_array(const void* site, const char* name, size_t begin, size_t bytes, size_t gap) {
  ASAN_UNPOISON_MEMORY_REGION(arena + begin - kGap, kGap + bytes + gap);
  memset(arena + begin - kGap, kCanary, kGap);
  memset(arena + begin, kPoison, bytes);
  memset(arena + begin + bytes, kCanary, gap);
  ASAN_POISON_MEMORY_REGION(arena + begin - kGap, kGap);
  ASAN_POISON_MEMORY_REGION(arena + begin + bytes, gap);
  own().arrays.push_back({site, name, begin, bytes, gap});
  return arena + begin;
}

void check_canary(const unsigned char* p, size_t bytes, const std::string& what) {
  for (size_t i = 0; i < bytes; ++i) {
    if (p[i] != kCanary) fail(nullptr, "something was written %zu bytes %s", i, what.c_str());
  }
}

}  // namespace

unsigned char* arena;

void shared_turn() { arena = all_shared[resident] == nullptr ? nullptr : own().bytes; }

void shared_begin(size_t dynamic_bytes) {
  if (all_shared[resident] == nullptr) all_shared[resident] = std::make_unique<Shared>();
  shared_turn();
  Shared& mine = own();
  ASAN_UNPOISON_MEMORY_REGION(arena, kArena);
  ASAN_POISON_MEMORY_REGION(arena, kArena);
  mine.arrays.clear();
  mine.static_end = kGap;
  mine.static_bytes = 0;
  add_array(nullptr, "dynamic shared memory", kDynamicAt, dynamic_bytes, kLastGap);
}

void shared_end() {
  for (const Array& a : own().arrays) {
    ASAN_UNPOISON_MEMORY_REGION(arena + a.begin - kGap, kGap + a.bytes + a.gap);
    check_canary(arena + a.begin - kGap, kGap, std::string("from 128 bytes before ") + a.name + " on");
    check_canary(arena + a.begin + a.bytes, a.gap, std::string("behind the end of ") + a.name);
  }
}

void* shared_array(const void* site, const char* name, size_t bytes) {
  Shared& mine = own();
  for (const Array& a : mine.arrays) {
    if (a.site == site) return arena + a.begin;
  }
  size_t& static_bytes = mine.static_bytes;
  static_bytes = round_up(static_bytes, 16) + bytes;
  if (static_bytes > kStaticLimit) fail(MOA_SITE, "%zu bytes of static shared memory; 48 KB are allowed", static_bytes);
  const bool asks = block.dynamic_bytes > moa::kSharedUnasked;
  const size_t limit = asks ? settings.shared_limit - moa::kSharedMost : kStaticLimit - block.dynamic_bytes;
  if (static_bytes > limit) {
    fail(MOA_SITE,
         "%zu bytes of static shared memory beside %zu dynamic ones, for which the launch %s; %zu are allowed",
         static_bytes, block.dynamic_bytes, asks ? "asks" : "does not ask", limit);
  }
  const size_t begin = mine.static_end;
  mine.static_end = round_up(begin + bytes, 128) + 2 * kGap;
  if (mine.static_end > kDynamicAt - kGap) fail(MOA_SITE, "more than 48 KB of static shared memory, padding included");
  return add_array(site, name, begin, bytes, kGap);
}

void* dynamic_shared() { return arena + kDynamicAt; }

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, Site site) {
  if (!is_shared(p)) fail(site, "%s is not in shared memory", what);
  const Region array = region_of(p);
  if (array.begin == nullptr) fail(site, "%s lies outside every shared array", what);
  const std::ptrdiff_t inside = static_cast<const unsigned char*>(p) - array.begin;
  if (inside < 0 || static_cast<size_t>(inside) + bytes > array.bytes) {
    fail(site, "%s is out of bounds: bytes %td to %td of %s, which has %zu", what, inside,
         inside + static_cast<std::ptrdiff_t>(bytes), array.name, array.bytes);
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail(site, "%s is misaligned: byte %td of %s; %zu-byte aligned is allowed", what, inside, array.name, alignment);
  }
}

// ---- Asynchronous copies: poison at once, the data at the wait.
__attribute__((noinline)) void copy_async(void* shared, const void* global, unsigned bytes, bool valid) {
  const Site site = MOA_SITE;
  maybe_yield();
  check_shared(shared, bytes, bytes, "the destination of cp.async", site);
  if (is_shared(global) && valid) fail(site, "the source of cp.async is in shared memory");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail(site, "the source of cp.async is misaligned: %p; %u-byte aligned is allowed", global, bytes);
  }
  Copy copy{shared, {}, bytes, self->group};
  if (valid) {
#if !defined(__SANITIZE_ADDRESS__)  // which says more about it
    const Region source = region_of(global);
    if (source.begin == nullptr) fail(site, "the source of cp.async is no buffer in global memory");
    const std::ptrdiff_t at = static_cast<const unsigned char*>(global) - source.begin;
    if (at < 0 || static_cast<size_t>(at) + bytes > source.bytes) {
      fail(site, "the source of cp.async is out of bounds: byte %td of a buffer of %zu", at, source.bytes);
    }
#endif
    MOA_RECORD(global, bytes, kRead, site);
    memcpy(copy.data, global, bytes);
  }
  MOA_RECORD(shared, bytes, kAsyncWrite, site);
  memset(shared, kPoison, bytes);
  self->copies.push_back(copy);
}

void copy_commit() { ++self->group; }

__attribute__((noinline)) void copy_wait(unsigned allowed) {
  auto& copies = self->copies;
  size_t landed = 0;
  for (; landed < copies.size() && copies[landed].group + allowed < self->group; ++landed) {
    const Copy& copy = copies[landed];
    memcpy(copy.to, copy.data, copy.bytes);
    MOA_RECORD(copy.to, copy.bytes, kWrite, MOA_SITE);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

__attribute__((noinline)) void before_atomic(const void* p, size_t bytes, [[maybe_unused]] bool ordered, Site site) {
  maybe_yield();
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(site, "an atomic on a misaligned address");
  if (is_shared(p)) check_shared(p, bytes, bytes, "the operand of an atomic", site);
  if (ordered) {
    MOA_RECORD(p, bytes, kAcquireRelease, site);
  } else {
    MOA_RECORD(p, bytes, kAtomic, site);
  }
}

// ---- Bank conflicts: a request of up to 128 bytes is one cycle unless two different words want the same bank.
namespace {
using Where = std::pair<const char*, Site>;  // kernel and line
std::map<Where, Conflicts> conflict_table;
Where last_where;
Conflicts* last_conflicts;  // of last_where

// The most words that one bank has to give.
unsigned cycles_of(const void* const* p, unsigned lanes, unsigned words) {
  // Mostly that is one word per bank.
  uintptr_t word_of[32] __attribute__((uninitialized));
  unsigned used = 0;
  bool twice = false;
  for (unsigned l = 0; l < lanes; ++l) {
    if (p[l] == nullptr) continue;
    for (unsigned w = 0; w < words; ++w) {
      const uintptr_t word = reinterpret_cast<uintptr_t>(p[l]) / 4 + w;
      const unsigned bank = word % 32;
      if (!(used >> bank & 1u)) {
        used |= 1u << bank;
        word_of[bank] = word;
      }
      twice |= word_of[bank] != word;
    }
  }
  if (!twice) return used != 0 ? 1 : 0;
  uintptr_t seen[32][32] __attribute__((uninitialized));
  unsigned count[32] = {}, worst = 1;
  for (unsigned l = 0; l < lanes; ++l) {
    if (p[l] == nullptr) continue;
    for (unsigned w = 0; w < words; ++w) {
      const uintptr_t word = reinterpret_cast<uintptr_t>(p[l]) / 4 + w;
      const unsigned bank = word % 32;
      const auto* end = seen[bank] + count[bank];
      if (std::find(static_cast<const uintptr_t*>(seen[bank]), end, word) != end) continue;
      seen[bank][count[bank]++] = word;
      worst = std::max(worst, count[bank]);
    }
  }
  return worst;
}
}  // namespace

std::map<std::pair<std::string, Site>, Conflicts> take_conflicts() {
  std::map<std::pair<std::string, Site>, Conflicts> result;
  for (const auto& [where, c] : conflict_table) {
    Conflicts& sum = result[{where.first, where.second}];
    sum.requests += c.requests;
    sum.extra_cycles += c.extra_cycles;
  }
  conflict_table.clear();
  last_conflicts = nullptr;
  return result;
}

void count_conflicts(const void* const* p, unsigned lanes, unsigned bytes, Site site) {
  if (last_conflicts == nullptr || last_where != Where(block.kernel, site)) {
    last_where = {block.kernel, site};
    last_conflicts = &conflict_table[last_where];
  }
  Conflicts& total = *last_conflicts;
  const unsigned words = std::max(1u, bytes / 4), together = bytes <= 4 ? 32 : 128 / bytes;
  for (unsigned first = 0; first < lanes; first += together) {
    const unsigned cycles = cycles_of(p + first, std::min(lanes - first, together), words);
    if (cycles > 0) total.requests += 1, total.extra_cycles += cycles - 1;
  }
}

// ---- Global memory.
namespace {

struct Buffer {
  unsigned char *begin, *data;
  size_t bytes, gap_before;
  bool written;  // from the start
  bool adopted;  // somebody else's, without gaps
};
std::vector<Buffer> buffers;
constexpr size_t kBufferGap = 256;

}  // namespace

// `offset` is the address modulo 256: device memory starts at 256-byte boundaries, views of it anywhere.
void* device_alloc(size_t bytes, size_t offset, bool written) {
#if defined(__SANITIZE_ADDRESS__)
  // An allocation of its own that ends where the data ends: AddressSanitizer knows the rest.
  const size_t before = offset % 256, behind = 0;
#else
  const size_t before = kBufferGap + offset % 256, behind = kBufferGap;
#endif
  void* p = nullptr;
  if (posix_memalign(&p, 256, before + bytes + behind) != 0) throw std::bad_alloc();
  auto* begin = static_cast<unsigned char*>(p);
  memset(begin, kCanary, before);
  memset(begin + before, settings.poison, bytes);
  memset(begin + before + bytes, kCanary, behind);
  ASAN_POISON_MEMORY_REGION(begin, before);
  buffers.push_back({begin, begin + before, bytes, before, written, false});
  return begin + before;
}

void device_adopt(void* data, size_t bytes) {
  buffers.push_back({static_cast<unsigned char*>(data), static_cast<unsigned char*>(data), bytes, 0, true, true});
}

Region region_of(const void* p) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (is_shared(p)) {
    for (const Array& a : own().arrays) {
      const unsigned char* begin = arena + a.begin;
      if (at >= begin - kGap && at < begin + a.bytes + a.gap) return {begin, a.bytes, a.name, true};
    }
  } else {
    static size_t last;  // found
    if (last < buffers.size()) {
      const Buffer& b = buffers[last];
      if (at >= b.data && at < b.data + b.bytes) return {b.data, b.bytes, "global memory", b.written};
    }
    for (const Buffer& b : buffers) {
      if (at < b.begin || at >= b.data + b.bytes + kBufferGap) continue;
      last = static_cast<size_t>(&b - buffers.data());
      return {b.data, b.bytes, "global memory", b.written};
    }
  }
  return {nullptr, 0, nullptr, true};
}

void device_check() {
#if !defined(__SANITIZE_ADDRESS__)
  for (const Buffer& b : buffers) {
    if (b.adopted) continue;
    check_canary(b.begin, b.gap_before, "into the gap before a buffer in global memory");
    check_canary(b.data + b.bytes, kBufferGap,
                 "behind the end of a buffer in global memory of " + std::to_string(b.bytes) + " bytes");
  }
#endif
}

void device_free_all() {
  launched = false;
  for (const Buffer& b : buffers) {
    if (b.adopted) continue;
    ASAN_UNPOISON_MEMORY_REGION(b.begin, b.gap_before);
    free(b.begin);
  }
  buffers.clear();
  races_forget_buffers();
}

}  // namespace emu

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  emu::races_host_writes(p, bytes);
  memset(p, value, bytes);
  return cudaSuccess;
}
