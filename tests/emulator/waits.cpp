// What threads wait for: barriers, and what the lanes of a warp do together.
#include "emulator/collectives.h"
#include "emulator/scheduler.h"

namespace emu {
namespace {

void wait_for(const char* operation, unsigned mask, Site site, Combine combine) {
  Thread& me = *self;
  me.operation = operation;
  me.mask = mask;
  me.site = site;
  me.combine = combine;
  set_not_ready(me);
}

void barrier_at(const char* name, Site site) {
  const Thread* const first = now->first_in_barrier;
  if (first != nullptr && !same_line(first->site, site)) {
    fail(site, "this thread waits in %s, but %s in %s at %s", name, thread_name(*first).c_str(), first->operation,
         describe(first->site).c_str());
  }
  if (first == nullptr || self->rank < first->rank) now->first_in_barrier = self;
  wait_for(name, 0, site, nullptr);
  if (++now->in_barrier == now->alive) {
    finish_block_barrier();
    if (!shuffled) return;
    preempted = places > 1 && (random_bits() & 3u) == 0;  // what others may do before, they will
  }
  give_way();
}

// What the running lane is about to wait in is what the others wait in.
void compare_with_posted(const Warp& warp, const char* name, unsigned mask, Combine combine, Site site) {
  const Thread& me = *self;
  // One lane that waits in this mask speaks for all of them: they were compared when they came.
  const unsigned there = warp.posted & mask;
  if (there == 0) return;
  const Thread& other = *warp.lanes[__builtin_ctz(there)];
  const bool same = other.mask == mask && other.operation == name && other.combine == combine;
  const bool needs_me = other.mask >> me.lane & 1u;  // or it waits for others, and comes here later
  if (needs_me && !(same && same_line(other.site, site))) {
    fail(site, "the warp diverged: lane %u is in %s with mask %08x here, lane %u in %s with mask %08x at %s", me.lane,
         name, mask, other.lane, other.operation, other.mask, describe(other.site).c_str());
  }
}

inline __attribute__((always_inline)) void operate(const char* name, unsigned mask, void* slot, Combine combine,
                                                   Site site) {
  Thread& me = *self;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane & 1u)) fail(site, "%s: mask %08x leaves out the calling lane %u", name, mask, me.lane);
  if (warp.posted == 0) {
    warp.uniform = true;
    warp.mask = mask;
    warp.operation = name;
    warp.combine = combine;
    warp.site = site;
  } else if (!warp.uniform || warp.mask != mask || warp.operation != name || warp.combine != combine ||
             warp.site != site) {
    compare_with_posted(warp, name, mask, combine, site);
    warp.uniform = false;
  }
  warp.slots[me.lane] = slot;
  wait_for(name, mask, site, combine);
  warp.posted |= 1u << me.lane;
  if (const unsigned lanes = mask & warp.alive; (warp.posted & lanes) == lanes) finish_warp_operation(warp, me);
  if (!(warp.ready >> me.lane & 1u) || shuffled) give_way();
}

void combine_shuffle(void* const*, unsigned mask, Site site) {
  Warp& warp = *self->warp;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    const int from = warp.sources[lane];
    if (!(mask >> from & 1u)) fail(site, "lane %d shuffles from lane %d, which takes no part", lane, from);
    warp.results[lane] = warp.values[from];
  }
}

// One result for all lanes.
template <class F>
void fold(unsigned mask, unsigned result, F step) {
  Warp& warp = *self->warp;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) result = step(result, static_cast<unsigned>(warp.values[lane]), lane);
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) warp.results[lane] = result;
  }
}

#define MOA_FOLD(name, first, expression)                                                                        \
  void name(void* const*, unsigned mask, Site) {                                                                 \
    fold(mask, first, [](unsigned r, unsigned v, [[maybe_unused]] int lane) -> unsigned { return expression; }); \
  }
MOA_FOLD(ballot, 0, r | v << lane)
MOA_FOLD(any, 0, r | v)
MOA_FOLD(all, 1, r& v)
MOA_FOLD(add, 0, r + v)
MOA_FOLD(bit_and, ~0u, r& v)
MOA_FOLD(bit_or, 0, r | v)
MOA_FOLD(least, 0x7fffffffu, static_cast<int>(v) < static_cast<int>(r) ? v : r)
MOA_FOLD(most, 0x80000000u, static_cast<int>(v) > static_cast<int>(r) ? v : r)
MOA_FOLD(least_unsigned, ~0u, v < r ? v : r)
MOA_FOLD(most_unsigned, 0, v > r ? v : r)
#undef MOA_FOLD

void match(void* const*, unsigned mask, Site) {
  Warp& warp = *self->warp;
  for (unsigned left = mask; left != 0;) {
    const unsigned long long value = warp.values[__builtin_ctz(left)];
    unsigned same = 0;
    for (int lane = 0; lane < 32; ++lane) same |= unsigned(warp.values[lane] == value) << lane;
    same &= left;
    left &= ~same;
    for (int lane = 0; lane < 32; ++lane) {
      if (same >> lane & 1u) warp.results[lane] = same;
    }
  }
}

// As in Vote.
constexpr Combine kVotes[] = {ballot, any,   all,  match,          add,          bit_and,
                              bit_or, least, most, least_unsigned, most_unsigned};

}  // namespace

void finish_block_barrier() {
  now->in_barrier = 0;
  now->first_in_barrier = nullptr;
  races_block_barrier();
  for (unsigned w = 0; w < warp_count; ++w) {
    trace_warp_met(now->warps[w]);
    set_ready(now->warps[w], now->warps[w].alive);
  }
  if (shuffled) shuffle_warps();
}

// Runs the operation that `first` waits in, if every lane of its mask that has not exited waits in it.
void finish_warp_operation(Warp& warp, const Thread& first) {
  const unsigned mask = first.mask, lanes = mask & warp.alive;
  if ((warp.posted & lanes) != lanes) return;
  for (unsigned l = 0; l < 32 && !warp.uniform; ++l) {
    if ((lanes >> l & 1u) && warp.lanes[l]->mask != mask) return;
  }
  if (first.combine != nullptr) {
    first.combine(warp.slots, lanes, first.site);
  } else {
    races_warp_barrier(warp, lanes);
  }
  if (lanes == warp.alive) trace_warp_met(warp);
  warp.posted &= ~lanes;
  set_ready(warp, lanes);
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

__attribute__((noinline)) void warp_operation(const char* name, unsigned mask, void* slot, Combine combine) {
  operate(name, mask, slot, combine, MOA_SITE);
}

__attribute__((noinline)) unsigned long long shuffle_bits(const char* name, unsigned mask, unsigned long long value,
                                                          int from) {
  const Site site = MOA_SITE;
  may_give_way();
  Thread& me = *self;
  me.warp->values[me.lane] = value;
  me.warp->sources[me.lane] = from;
  operate(name, mask, nullptr, combine_shuffle, site);
  return me.warp->results[me.lane];
}

__attribute__((noinline)) unsigned vote(const char* name, unsigned mask, unsigned long long value, Vote kind) {
  const Site site = MOA_SITE;
  may_give_way();
  Thread& me = *self;
  me.warp->values[me.lane] = value;
  operate(name, mask, nullptr, kVotes[static_cast<int>(kind)], site);
  return static_cast<unsigned>(me.warp->results[me.lane]);
}

}  // namespace emu
