// Threads as fibers on stacks of their own, and who runs next.
#include <sys/mman.h>

#include <algorithm>

#include "emulator/collectives.h"
#include "emulator/scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers and the stack pointer, and continues where `to` was saved.
extern "C" void moa_emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden moa_emulator_switch
.globl moa_emulator_switch
.type moa_emulator_switch, @function
moa_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moa_emulator_switch, .-moa_emulator_switch
)");

namespace emu {

Settings settings;
Thread* self;
Block block;
Thread* threads;
unsigned thread_count, resident;
Resident residents[kMaxResidents];
Resident* now;
unsigned places;
unsigned long long random_state, steps;
bool shuffled, preempted;
Body body;
void* closure;

namespace {

constexpr size_t kStack = 256 * 1024, kPage = 4096;

unsigned warp_count;
void* scheduler_stack_pointer;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif

unsigned long long& next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

void* new_stack() {
  void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  return p;
}

// ---- Switching, with a word to AddressSanitizer.
void to_scheduler([[maybe_unused]] bool for_ever) {
  Thread* t = self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &t->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  moa_emulator_switch(&t->stack_pointer, scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

}  // namespace

void to_thread(Thread* t) {
  self = t;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, t->stack, kStack);
#endif
  moa_emulator_switch(&scheduler_stack_pointer, t->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  self = nullptr;
}

namespace {

void set_state(Thread& t, Thread::State state) {
  t.state = state;
  const unsigned bit = 1u << t.lane;
  t.warp->ready = state == Thread::ready ? t.warp->ready | bit : t.warp->ready & ~bit;
}

void finish_block_barrier();
void finish_warp_operation(Warp& warp, const Thread& first);

extern "C" void moa_emulator_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body(closure);
  Warp& warp = *self->warp;
  set_state(*self, Thread::done);
  warp.alive &= ~(1u << self->lane);
  --now->alive;
  if (warp.alive == 0) trace_warp_met(warp);
  // Exited threads are not waited for.
  if (now->alive > 0 && now->in_barrier == now->alive) finish_block_barrier();
  for (unsigned l = 0; l < 32; ++l) {
    if (warp.posted >> l & 1u) finish_warp_operation(warp, *warp.lanes[l]);
  }
  to_scheduler(true);
}

void start_thread(Thread& t) {
  // What moa_emulator_switch pops: six registers and a return address, leaving the stack as after a call.
  void** top = reinterpret_cast<void**>(static_cast<char*>(t.stack) + kStack) - 1;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(t.stack, kStack);
#endif
  *top = nullptr;
  *--top = reinterpret_cast<void*>(moa_emulator_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
  t.fake_stack = nullptr;
}

// ---- One block.
}  // namespace

void prepare_block() {
  thread_count = block.size.x * block.size.y * block.size.z;
  warp_count = (thread_count + 31) / 32;
  now->alive = thread_count;
  now->in_barrier = now->spinning = 0;
  for (unsigned w = 0; w < warp_count; ++w) {
    const unsigned lanes = std::min(32u, thread_count - 32 * w);
    const unsigned all = lanes == 32 ? ~0u : (1u << lanes) - 1;
    now->warps[w] = Warp{{}, all, all, 0, w};
    now->warp_order[w] = w;
  }
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    if (t.stack == nullptr) t.stack = new_stack();
    t.index = {i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y};
    t.rank = i;
    t.lane = i % 32;
    t.warp = &now->warps[i / 32];
    t.warp->lanes[t.lane] = &t;
    t.state = Thread::ready;
    t.operation = nullptr;
    t.copies.clear();
    t.group = 0;
    start_thread(t);
  }
}

Thread* next_thread() {
  for (unsigned i = 0; i < warp_count; ++i) {
    Warp& warp = now->warps[now->warp_order[i]];
    if (warp.ready == 0) continue;
    unsigned lane = static_cast<unsigned>(__builtin_ctz(warp.ready));
    if (shuffled) {  // the first ready lane from a random one on
      const unsigned from = static_cast<unsigned>(random_bits()) & 31u, later = warp.ready >> from << from;
      if (later != 0) lane = static_cast<unsigned>(__builtin_ctz(later));
    }
    return warp.lanes[lane];
  }
  return nullptr;
}

void shuffle_warps() {
  for (unsigned i = warp_count; i > 1; --i) std::swap(now->warp_order[i - 1], now->warp_order[random_bits() % i]);
}

namespace {

// ---- Waiting.
void wait_for(const char* operation, unsigned mask, Site site) {
  self->operation = operation;
  self->mask = mask;
  self->site = site;
  set_state(*self, Thread::waiting);
}

void finish_block_barrier() {
  now->in_barrier = 0;
  races_block_barrier();
  for (unsigned w = 0; w < warp_count; ++w) trace_warp_met(now->warps[w]);
  for (unsigned i = 0; i < thread_count; ++i) {
    if (threads[i].state == Thread::waiting) set_state(threads[i], Thread::ready);
  }
  if (shuffled) shuffle_warps();
}

void barrier_at(const char* name, Site site) {
  for (unsigned i = 0; now->in_barrier > 0 && i < thread_count; ++i) {
    const Thread& t = threads[i];
    const bool there = t.state == Thread::waiting && t.combine == nullptr && t.mask == 0;
    if (there && !same_line(t.site, site)) {
      fail(site, "this thread waits in %s, but %s in %s at %s", name, thread_name(t).c_str(), t.operation,
           describe(t.site).c_str());
    }
    if (there) break;
  }
  self->combine = nullptr;
  wait_for(name, 0, site);
  if (++now->in_barrier == now->alive) {
    finish_block_barrier();
    if (!shuffled) return;
    preempted = places > 1 && (random_bits() & 3u) == 0;  // what others may do before, they will
  }
  to_scheduler(false);
}

// Runs the operation that `first` waits in, if every lane of its mask that has not exited waits in it.
void finish_warp_operation(Warp& warp, const Thread& first) {
  const unsigned mask = first.mask, lanes = mask & warp.alive;
  if ((warp.posted & lanes) != lanes) return;
  void* slots[32] = {};
  for (unsigned l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1u)) continue;
    if (warp.lanes[l]->mask != mask) return;
    slots[l] = warp.lanes[l]->slot;
  }
  if (first.combine != nullptr) {
    first.combine(slots, lanes, first.site);
  } else {
    races_warp_barrier(warp, lanes);
  }
  if (lanes == warp.alive) trace_warp_met(warp);
  warp.posted &= ~lanes;
  for (unsigned l = 0; l < 32; ++l) {
    if (lanes >> l & 1u) set_state(*warp.lanes[l], Thread::ready);
  }
}

}  // namespace

bool on_stack(const void* p) {
  const auto* at = static_cast<const char*>(p);
  return at >= static_cast<char*>(self->stack) && at < static_cast<char*>(self->stack) + kStack;
}

unsigned long long random_bits() { return next_random() >> 16; }

void leave_launch() {
  to_scheduler(true);
  __builtin_unreachable();
}

__attribute__((noinline)) void block_barrier(const char* name) { barrier_at(name, MOA_SITE); }

__attribute__((noinline)) int block_vote(const char* name, int value, int kind) {
  const Site site = MOA_SITE;
  Resident& me = *now;
  if (me.in_barrier == 0) me.vote_count = 0;
  me.vote_count += value != 0;
  const int alive = static_cast<int>(me.alive), count = me.vote_count;
  if (me.in_barrier + 1 == me.alive) me.vote_result = kind == 0 ? count : kind == 1 ? count == alive : count != 0;
  barrier_at(name, site);
  return me.vote_result;
}

__attribute__((noinline)) void warp_operation(const char* name, unsigned mask, void* slot,
                                              void (*combine)(void* const*, unsigned, Site)) {
  const Site site = MOA_SITE;
  Thread& me = *self;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane & 1u)) fail(site, "%s: mask %08x leaves out the calling lane %u", name, mask, me.lane);
  // One lane that waits in this mask speaks for all of them: they were compared when they came.
  if (const unsigned there = warp.posted & mask; there != 0) {
    const Thread& other = *warp.lanes[__builtin_ctz(there)];
    const bool same = other.mask == mask && other.operation == name && other.combine == combine;
    const bool needs_me = other.mask >> me.lane & 1u;  // or it waits for others, and comes here later
    if (needs_me && !(same && same_line(other.site, site))) {
      fail(site, "the warp diverged: lane %u is in %s with mask %08x here, lane %u in %s with mask %08x at %s", me.lane,
           name, mask, other.lane, other.operation, other.mask, describe(other.site).c_str());
    }
  }
  me.slot = slot;
  me.combine = combine;
  wait_for(name, mask, site);
  warp.posted |= 1u << me.lane;
  finish_warp_operation(warp, me);
  if (me.state == Thread::waiting || shuffled) to_scheduler(false);
}

void maybe_yield() {
  if (!shuffled || (random_bits() & 7u) != 0) return;
  if ((random_bits() & 3u) == 0) shuffle_warps();
  preempted = places > 1 && (random_bits() & 15u) == 0;
  to_scheduler(false);
}

void wake_spinning() {
  for (unsigned i = 0; now->spinning > 0 && i < thread_count; ++i) {
    if (threads[i].state == Thread::spinning) set_state(threads[i], Thread::ready), --now->spinning;
  }
}

void spin_until(const unsigned* counter, unsigned value, Site site) {
  maybe_yield();
  if (is_shared(counter)) fail(site, "await on a counter in shared memory");
  bool looked = false;
  while (*static_cast<const volatile unsigned*>(counter) < value) {
    if (looked) --steps;
    looked = true;
    self->combine = nullptr;
    self->operation = "await";
    self->mask = 0;
    self->site = site;
    set_state(*self, Thread::spinning);
    ++now->spinning;
    to_scheduler(false);
  }
  MOA_RECORD(counter, sizeof *counter, kAcquire, site);
}

}  // namespace emu

void __threadfence() { emu::races_fence(); }
