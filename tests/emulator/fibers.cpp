// Threads as fibers on stacks of their own, and who runs next.
#include <sys/mman.h>

#include <algorithm>

#include "emulator/scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

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
unsigned places, warp_count;
unsigned long long random_state, steps;
bool shuffled, preempted;
unsigned char* stacks;
Body body;
void* closure;

namespace {

constexpr size_t kPage = 4096, kLine = 64;

unsigned stack_count;
void* scheduler_stack_pointer;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif

void* new_stack() {
  if (stacks == nullptr) {
    constexpr size_t kAll = kMaxResidents * kMaxThreads * kStack;
    void* all = mmap(nullptr, kAll, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    stacks = static_cast<unsigned char*>(all);
  }
  unsigned char* p = stacks + kStack * stack_count;
  if (mprotect(p + kPage, kStack - kPage, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  ++stack_count;
  return p;
}

}  // namespace

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

void to_thread(Thread* t) {
  ++steps;
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

extern "C" void moa_emulator_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body(closure);
  Warp& warp = *self->warp;
  set_not_ready(*self);
  warp.alive &= ~(1u << self->lane);
  --now->alive;
  if (warp.alive == 0) trace_warp_met(warp);
  // Exited threads are not waited for.
  if (now->alive > 0 && now->in_barrier == now->alive) finish_block_barrier();
  for (unsigned l = 0; l < 32; ++l) {
    if (warp.posted >> l & 1u) finish_warp_operation(warp, *warp.lanes[l]);
  }
  give_way(true);
}

void start_thread(Thread& t) {
  // What moa_emulator_switch pops: six registers and a return address, leaving the stack as after a call. Stacks begin
  // at different cache lines of a page: the caches have few places for lines with equal last bits.
  const size_t colour = t.rank * 9 % (kPage / kLine) * kLine;
  void** top = reinterpret_cast<void**>(static_cast<char*>(t.stack) + kStack - colour) - 1;
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
  now->first_in_barrier = nullptr;
  now->ready_warps = warp_count == 32 ? ~0u : (1u << warp_count) - 1;
  for (unsigned w = 0; w < warp_count; ++w) {
    const unsigned lanes = std::min(32u, thread_count - 32 * w);
    const unsigned all = lanes == 32 ? ~0u : (1u << lanes) - 1;
    Warp& warp = now->warps[w];
    warp.alive = warp.ready = all;
    warp.posted = warp.spinning = 0;
    warp.number = warp.place = w;
    now->warp_order[w] = &warp;
  }
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    if (t.stack == nullptr) t.stack = new_stack();
    t.index = {i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y};
    t.rank = i;
    t.lane = i % 32;
    t.warp = &now->warps[i / 32];
    t.warp->lanes[t.lane] = &t;
    t.operation = nullptr;
    t.copies.clear();
    t.group = 0;
    start_thread(t);
  }
}

namespace {
struct Inverse {
  unsigned long long of[kMaxThreads / 32 + 1] = {};  // 2^64 / i, rounded up
  constexpr Inverse() {
    for (unsigned long long i = 2; i <= kMaxThreads / 32; ++i) of[i] = ~0ull / i + 1;
  }
};
constexpr Inverse kInverse;
}  // namespace

void shuffle_warps() {
  for (unsigned i = warp_count; i > 1; --i) {
    // random_bits() % i: exact, since it has 48 bits.
    const unsigned long long bits = random_bits();
    const auto quotient = static_cast<unsigned long long>((unsigned __int128){bits} * kInverse.of[i] >> 64);
    std::swap(now->warp_order[i - 1], now->warp_order[bits - quotient * i]);
  }
  now->ready_warps = 0;
  for (unsigned i = 0; i < warp_count; ++i) {
    now->warp_order[i]->place = i;
    set_ready(*now->warp_order[i], 0);
  }
}

void leave_launch() {
  to_scheduler(true);
  __builtin_unreachable();
}

void maybe_yield() { may_give_way(); }

void give_way_at_random() {
  if ((random_bits() & 3u) == 0) shuffle_warps();
  preempted = places > 1 && (random_bits() & 15u) == 0;
  give_way();
}

void wake_spinning() {
  for (unsigned w = 0; now->spinning > 0 && w < warp_count; ++w) {
    Warp& warp = now->warps[w];
    now->spinning -= static_cast<unsigned>(__builtin_popcount(warp.spinning));
    set_ready(warp, warp.spinning);
    warp.spinning = 0;
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
    set_not_ready(*self);
    self->warp->spinning |= 1u << self->lane;
    ++now->spinning;
    give_way();
  }
  MOA_RECORD(counter, sizeof *counter, kAcquire, site);
}

}  // namespace emu

void __threadfence() { emu::races_fence(); }
