// What the parts of the machine share among themselves; kernels never see it.
#pragma once
#include <stdexcept>
#include <string>

#include "emulator/runtime.h"

namespace emu {

struct Settings {
  unsigned long long seed = 0;      // 0: threads and blocks in index order; others: a random interleaving
  size_t shared_limit = 99 * 1024;  // static and dynamic; the least of the architectures we ship (sm_86, 89, 120)
  int multiprocessors = 132;
  unsigned char poison = 0xff;  // of work memory
  bool dry = false;             // launches are checked and noted, and nothing runs
  unsigned residents = 0;       // blocks on the machine at once, up to kMaxResidents; 0: seed % 4 + 1
};
extern Settings settings;

struct Launch {
  const char* kernel;  // as the source says it
  const void* function;
};
std::vector<Launch>& launches();
extern bool launched;  // something, in this call

// Blocks that have begun share the machine: one runs until it ends, until all its threads wait, or, under a seed, for a
// while. What belongs to a block is kept per place on the machine, and `resident` is that of the running one.
constexpr unsigned kMaxResidents = 4;
extern unsigned resident;

// Threads of the running block.
extern Thread* threads;
extern unsigned thread_count;

// report.cpp
extern std::string failure;       // what `fail` said
std::string describe(Site site);  // "file:line", callers of inlined functions after " < "
bool same_line(Site a, Site b);
std::string thread_name(const Thread& t);
[[noreturn]] void leave_launch();  // fibers.cpp: back to run_grid, which throws `failure`

// memory.cpp
void shared_begin(size_t dynamic_bytes);  // fresh, poisoned, of the running block
void shared_end();                        // canaries
void device_check();                      // canaries
struct Region {                           // a shared array, or a buffer of global memory
  const unsigned char* begin;             // null: none
  size_t bytes;
  const char* name;
  bool written;  // from the start
};
Region region_of(const void* p);  // the one around p, the gaps around it included
void shared_turn();               // to the running block's
constexpr size_t kStaticLimit = 48 * 1024, kLastGap = 16 * 1024, kDynamicAt = 2 * kStaticLimit;
constexpr size_t kArena = kDynamicAt + 232 * 1024 + kLastGap;
extern unsigned char* arena;  // the running block's shared memory, gaps included
inline size_t shared_offset(const void* p) { return static_cast<size_t>(static_cast<const unsigned char*>(p) - arena); }
inline bool is_shared(const void* p) { return shared_offset(p) < kArena; }

// fibers.cpp: the stacks of all threads lie side by side.
constexpr size_t kStack = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;
extern unsigned char* stacks;
inline bool on_stack(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - stacks) < kMaxResidents * kMaxThreads * kStack;
}

// races.cpp and trace.cpp, in the build that has them
#ifdef MOA_EMULATE_TSAN
void races_grid_begin(bool early);
void races_block_begin();
void races_block_end();
void races_await_launch();
void races_block_barrier();
void races_warp_barrier(Warp& warp, unsigned mask);
void races_fence();
void races_host_writes(const void* p, size_t bytes);
void races_forget_buffers();
void trace_warp_met(const Warp& warp);
#else
inline void races_grid_begin(bool) {}
inline void races_block_begin() {}
inline void races_block_end() {}
inline void races_await_launch() {}
inline void races_block_barrier() {}
inline void races_warp_barrier(Warp&, unsigned) {}
inline void races_fence() {}
inline void races_host_writes(const void*, size_t) {}
inline void races_forget_buffers() {}
inline void trace_warp_met(const Warp&) {}
#endif

}  // namespace emu
