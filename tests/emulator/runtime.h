// The machine: threads as fibers, a few blocks at once, shared memory, asynchronous copies, errors.
#pragma once
#include <tuple>
#include <vector>

#include "emulator/host_api.h"

namespace emu {

// ---- Errors. `fail` ends the launch from inside a kernel: MOA_LAUNCH throws std::runtime_error with this text, the
// kernel, block, thread and source line. A site is a return address into a kernel; it becomes a line only in a report.
using Site = const void*;
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
#define MOA_SITE __builtin_return_address(0)

// ---- One thread, one warp, the block that runs now.
struct Copy {  // an asynchronous copy that has not landed
  void* to;
  unsigned char data[16];
  unsigned bytes, group;
};

// What a warp operation does once all its lanes are there: slots[lane] is what the lane gave.
using Combine = void (*)(void* const* slots, unsigned mask, Site site);

struct Warp;
struct alignas(64) Thread {
  // What a switch touches: one cache line.
  void* stack_pointer;
  uint3 index;
  unsigned rank, lane;  // in the block, in the warp
  unsigned mask;        // this and what follows: what it waits for, if it waits
  Warp* warp;
  const char* operation;
  Site site;
  Combine combine;

  std::vector<Copy> copies;
  unsigned group;  // of the next copy
  void* stack;
  void* fake_stack;  // AddressSanitizer's
};

struct Warp {
  unsigned alive, ready, posted, spinning;  // a bit per lane; posted: waits in a warp operation
  unsigned number, place;                   // in the block; in the order in which warps run
  // Those that are posted wait in this, if it is the same for all.
  bool uniform;
  unsigned mask;
  const char* operation;
  Site site;
  Combine combine;
  Thread* lanes[32];
  void* slots[32];
  // Of shuffles and votes, by lane.
  unsigned long long values[32], results[32];
  int sources[32];
};

struct Block {
  const char* kernel;
  uint3 index;
  dim3 size, grid;
  size_t dynamic_bytes;
  unsigned long long number;  // in the grid
};

extern Thread* self;
extern Block block;

// ---- Scheduling.
// Waits until every thread of the warp in `mask` that has not exited is here; the last one calls combine with a pointer
// per lane. Same operation, mask and source line for all, or it is an error.
void warp_operation(const char* name, unsigned mask, void* slot, Combine combine);
void block_barrier(const char* name);
void maybe_yield();  // lets others run here, under a seed other than 0
// Returns when *counter, in global memory, is `value` or more: other blocks run meanwhile.
void spin_until(const unsigned* counter, unsigned value, Site site);
void launch_in_front_ended();  // await_launch: it has, but for the race detector

// ---- Memory.
void* shared_array(const void* site, const char* name, size_t bytes);
void* dynamic_shared();
// An error unless p .. p + bytes lies in one shared array of this block, aligned to `alignment`.
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, Site site);
void copy_async(void* shared, const void* global, unsigned bytes, bool valid);
void copy_commit();
void copy_wait(unsigned allowed);

// Extra shared-memory cycles of a warp access: lane l touches `bytes` at p[l] (null: it takes no part).
void count_conflicts(const void* const* p, unsigned lanes, unsigned bytes, Site site);

// Global memory of one test: exact sizes, poisoned, with canaries; bind.h gives it to kernels. If it is not `written`,
// nobody may read it before somebody writes it: the race detector's build knows.
void* device_alloc(size_t bytes, size_t offset_in_line, bool written);
void device_adopt(void* data, size_t bytes);  // memory of the test's own, taken where it lies
void device_free_all();

// ---- The race detector, in the build that has one. The compiler calls it before plain accesses in a kernel; what the
// emulator itself touches for a kernel (MOA_UNTRACED functions) is recorded by hand.
#define MOA_UNTRACED __attribute__((no_sanitize("thread")))
#ifdef MOA_EMULATE_TSAN
enum Access { kRead, kWrite, kAtomic, kAcquire, kAcquireRelease, kAsyncWrite };
void record_access(const void* p, size_t bytes, Access access, Site site);
#define MOA_RECORD(p, bytes, access, site) ::emu::record_access(p, bytes, ::emu::access, site)
#else
#define MOA_RECORD(p, bytes, access, site) static_cast<void>(0)
#endif

// ---- Launch.
using Body = void (*)(void* closure);
extern bool early;  // the next launch is: it runs behind the one in front, but only await_launch orders them
cudaError_t run_grid(const char* kernel, const void* function, dim3 grid, dim3 block, size_t dynamic_bytes, Body body,
                     void* closure);

template <class... P, class... A>
cudaError_t launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t,
                   const A&... args) {
  struct Closure {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } closure{kernel, std::tuple<P...>(static_cast<P>(args)...)};
  const Body body = [](void* c) {
    auto* closure = static_cast<Closure*>(c);
    std::apply(closure->kernel, closure->args);
  };
  return run_grid(name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes, body, &closure);
}
template <class K, class... A>
cudaError_t launch_early(const char* name, K kernel, const A&... args) {
  early = true;
  return launch(name, kernel, args...);
}

}  // namespace emu
