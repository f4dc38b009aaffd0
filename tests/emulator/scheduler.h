// What fibers.cpp (the threads of a block) and blocks.cpp (the blocks of a grid) know of each other.
#pragma once
#include <memory>

#include "emulator/internal.h"

namespace emu {

constexpr unsigned kMaxThreads = 1024;

// A block on the machine.
struct Resident {
  Block block;
  bool here;     // it has begun, and not ended
  bool stalled;  // all its threads wait, some for another block, and since it looked last nobody did anything
  std::unique_ptr<Thread[]> threads;
  Warp warps[kMaxThreads / 32];
  unsigned warp_order[kMaxThreads / 32];
  unsigned alive, in_barrier, spinning;
  int vote_count, vote_result;
};
extern Resident residents[kMaxResidents];
extern Resident* now;  // residents + resident
extern unsigned places;
extern unsigned long long random_state, steps;  // steps: of threads, those that looked in vain not counted
extern bool shuffled, preempted;
extern Body body;
extern void* closure;

// fibers.cpp, of the running block
void prepare_block();
void shuffle_warps();
Thread* next_thread();  // null: all wait
void to_thread(Thread* t);
void wake_spinning();

}  // namespace emu
