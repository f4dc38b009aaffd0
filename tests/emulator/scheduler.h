// What fibers.cpp (the threads of a block), waits.cpp (what they wait for) and blocks.cpp (the blocks of a grid) know of
// each other.
#pragma once
#include <memory>

#include "emulator/internal.h"

namespace emu {

// A block on the machine.
struct Resident {
  Block block;
  bool here;     // it has begun, and not ended
  bool stalled;  // all its threads wait, some for another block, and since it looked last nobody did anything
  std::unique_ptr<Thread[]> threads;
  Warp warps[kMaxThreads / 32];
  Warp* warp_order[kMaxThreads / 32];
  unsigned ready_warps;  // a bit for each of warp_order that has ready lanes
  unsigned alive, in_barrier, spinning;
  const Thread* first_in_barrier;  // by rank
  int vote_count, vote_result;
};
extern Resident residents[kMaxResidents];
extern Resident* now;  // residents + resident
extern unsigned places, warp_count;
extern unsigned long long random_state, steps;  // steps: of threads, those that looked in vain not counted
extern bool shuffled, preempted;
extern Body body;
extern void* closure;

inline unsigned long long random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state >> 16;
}

enum class State { ready, waiting, spinning, done };
inline State state_of(const Thread& t) {
  const auto has = [&](unsigned lanes) { return (lanes >> t.lane & 1u) != 0; };
  return !has(t.warp->alive)     ? State::done
         : has(t.warp->ready)    ? State::ready
         : has(t.warp->spinning) ? State::spinning
                                 : State::waiting;
}

// fibers.cpp, of the running block
void prepare_block();
void shuffle_warps();
void to_thread(Thread* t);
void to_scheduler(bool for_ever);
void wake_spinning();
void give_way_at_random();

// waits.cpp
void finish_block_barrier();
void finish_warp_operation(Warp& warp, const Thread& first);

// ---- Who can go on.
inline void set_ready(Warp& warp, unsigned lanes) {
  warp.ready |= lanes;
  if (warp.ready != 0) now->ready_warps |= 1u << warp.place;
}
inline void set_not_ready(const Thread& t) {
  Warp& warp = *t.warp;
  warp.ready &= ~(1u << t.lane);
  if (warp.ready == 0) now->ready_warps &= ~(1u << warp.place);
}

// Null: all wait.
inline Thread* next_thread() {
  if (now->ready_warps == 0) return nullptr;
  const Warp& warp = *now->warp_order[__builtin_ctz(now->ready_warps)];
  unsigned lane = static_cast<unsigned>(__builtin_ctz(warp.ready));
  if (shuffled) {  // the first ready lane from a random one on
    const unsigned from = static_cast<unsigned>(random_bits()) & 31u, later = warp.ready >> from << from;
    if (later != 0) lane = static_cast<unsigned>(__builtin_ctz(later));
  }
  return warp.lanes[lane];
}

// ---- Switching.
// Saves the callee-saved registers and the stack pointer, and continues where `to` was saved.
extern "C" void moa_emulator_switch(void** from, void* to);

// Lets another thread go on: the next one, or the scheduler where that has something to do.
inline void give_way([[maybe_unused]] bool for_ever = false) {
#if !defined(__SANITIZE_ADDRESS__)  // which the scheduler tells of every switch
  if (!preempted && now->alive > 0) {
    if (Thread* const next = next_thread()) {
      Thread* const me = self;
      ++steps;
      self = next;
      if (next != me) moa_emulator_switch(&me->stack_pointer, next->stack_pointer);
      return;
    }
  }
#endif
  to_scheduler(for_ever);
}

// maybe_yield, inlined.
inline void may_give_way() {
  if (shuffled && (random_bits() & 7u) == 0) give_way_at_random();
}

}  // namespace emu
