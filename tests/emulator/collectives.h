// Barriers, shuffles, votes, matches, atomics and fences of a kernel.
#pragma once
#include "emulator/runtime.h"

#define MOA_INLINE inline __attribute__((always_inline))  // so that return addresses lie in the kernel

// ---- Barriers. Only __syncthreads and __syncwarp order memory within a block, and arrive and await between blocks; atomics
// do so with a fence in front (what is handed on) and a fence behind (what is taken).
MOA_INLINE void __syncthreads() { ::emu::block_barrier("__syncthreads"); }
MOA_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { ::emu::warp_operation("__syncwarp", mask, nullptr, nullptr); }
void __threadfence();
inline void __threadfence_block() {}
inline void __threadfence_system() { __threadfence(); }

// ---- Shuffles.
namespace emu {
template <class T>
struct Shuffle {
  T value, result;
  int from;  // lane
};
template <class T>
void combine_shuffle(void* const* slots, unsigned mask, Site site) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    auto* s = static_cast<Shuffle<T>*>(slots[lane]);
    if (!(mask >> s->from & 1u)) fail(site, "lane %d shuffles from lane %d, which takes no part", lane, s->from);
    s->result = static_cast<Shuffle<T>*>(slots[s->from])->value;
  }
}
template <class T>
MOA_INLINE T shuffle(const char* name, unsigned mask, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "as CUDA's");
  Shuffle<T> s{value, value, from};
  maybe_yield();
  warp_operation(name, mask, &s, combine_shuffle<T>);
  return s.result;
}
// The lane itself where the source lies outside its group of `width`.
inline int lane_or_self(int lane, int width) {
  const int mine = static_cast<int>(self->lane), first = mine / width * width;
  return lane < first || lane >= first + width ? mine : lane;
}
}  // namespace emu

template <class T>
MOA_INLINE T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  const int first = static_cast<int>(emu::self->lane) / width * width;
  return emu::shuffle("__shfl_sync", mask, v, first + (lane & (width - 1)));
}
template <class T>
MOA_INLINE T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(emu::self->lane) - static_cast<int>(delta);
  return emu::shuffle("__shfl_up_sync", mask, v, emu::lane_or_self(lane, width));
}
template <class T>
MOA_INLINE T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(emu::self->lane) + static_cast<int>(delta);
  return emu::shuffle("__shfl_down_sync", mask, v, emu::lane_or_self(lane, width));
}
template <class T>
MOA_INLINE T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  // Lanes of a later group are out of reach, those of an earlier one are not.
  const int mine = static_cast<int>(emu::self->lane), lane = mine ^ bits, end = mine / width * width + width;
  return emu::shuffle("__shfl_xor_sync", mask, v, lane >= end ? mine : lane);
}

// ---- Votes, matches and integer reductions: every lane posts a value, and gets one.
namespace emu {
template <class T>
struct Vote {
  T value;
  unsigned result;
};
template <class T, class F>
MOA_INLINE unsigned vote(const char* name, unsigned mask, T value, F) {
  Vote<T> v{value, 0};
  maybe_yield();
  warp_operation(name, mask, &v, [](void* const* slots, unsigned mask, Site) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      auto* mine = static_cast<Vote<T>*>(slots[lane]);
      unsigned result = F::start(mask);
      for (int other = 0; other < 32; ++other) {
        if (!(mask >> other & 1u)) continue;
        F::step(result, static_cast<Vote<T>*>(slots[other])->value, other, mine->value);
      }
      mine->result = result;
    }
  });
  return v.result;
}
#define MOA_VOTE(Name, first, statement)                                                               \
  struct Name {                                                                                        \
    static unsigned start([[maybe_unused]] unsigned mask) { return first; }                            \
    template <class T>                                                                                 \
    static void step(unsigned& result, T theirs, [[maybe_unused]] int lane, [[maybe_unused]] T mine) { \
      statement;                                                                                       \
    }                                                                                                  \
  }
MOA_VOTE(Ballot, 0, result |= unsigned(theirs != 0) << lane);
MOA_VOTE(Any, 0, result |= unsigned(theirs != 0));
MOA_VOTE(All, 1, result &= unsigned(theirs != 0));
MOA_VOTE(Match, 0, result |= unsigned(theirs == mine) << lane);
MOA_VOTE(Add, 0, result += static_cast<unsigned>(theirs));
MOA_VOTE(And, ~0u, result &= static_cast<unsigned>(theirs));
MOA_VOTE(Or, 0, result |= static_cast<unsigned>(theirs));
MOA_VOTE(Min, static_cast<unsigned>(1 << 30) * 2 - 1, if (theirs < T(result)) result = unsigned(theirs));
MOA_VOTE(Max, static_cast<unsigned>(1 << 30) * 2, if (theirs > T(result)) result = unsigned(theirs));
MOA_VOTE(UMin, ~0u, if (theirs < T(result)) result = unsigned(theirs));
MOA_VOTE(UMax, 0, if (theirs > T(result)) result = unsigned(theirs));
#undef MOA_VOTE
}  // namespace emu

MOA_INLINE unsigned __ballot_sync(unsigned m, int v) { return emu::vote("__ballot_sync", m, v, emu::Ballot()); }
MOA_INLINE int __any_sync(unsigned m, int v) { return int(emu::vote("__any_sync", m, v, emu::Any())); }
MOA_INLINE int __all_sync(unsigned m, int v) { return int(emu::vote("__all_sync", m, v, emu::All())); }
template <class T>
MOA_INLINE unsigned __match_any_sync(unsigned m, T v) {
  return emu::vote("__match_any_sync", m, v, emu::Match());
}
MOA_INLINE unsigned __reduce_add_sync(unsigned m, unsigned v) { return emu::vote("__reduce_add", m, v, emu::Add()); }
MOA_INLINE int __reduce_add_sync(unsigned m, int v) { return int(emu::vote("__reduce_add", m, v, emu::Add())); }
MOA_INLINE unsigned __reduce_and_sync(unsigned m, unsigned v) { return emu::vote("__reduce_and", m, v, emu::And()); }
MOA_INLINE unsigned __reduce_or_sync(unsigned m, unsigned v) { return emu::vote("__reduce_or", m, v, emu::Or()); }
MOA_INLINE unsigned __reduce_min_sync(unsigned m, unsigned v) { return emu::vote("__reduce_min", m, v, emu::UMin()); }
MOA_INLINE int __reduce_min_sync(unsigned m, int v) { return int(emu::vote("__reduce_min", m, v, emu::Min())); }
MOA_INLINE unsigned __reduce_max_sync(unsigned m, unsigned v) { return emu::vote("__reduce_max", m, v, emu::UMax()); }
MOA_INLINE int __reduce_max_sync(unsigned m, int v) { return int(emu::vote("__reduce_max", m, v, emu::Max())); }

// ---- Whole-block votes.
namespace emu {
int block_vote(const char* name, int value, int kind);  // kind: 0 counts, 1 and, 2 or
}
MOA_INLINE int __syncthreads_count(int v) { return emu::block_vote("__syncthreads_count", v, 0); }
MOA_INLINE int __syncthreads_and(int v) { return emu::block_vote("__syncthreads_and", v, 1); }
MOA_INLINE int __syncthreads_or(int v) { return emu::block_vote("__syncthreads_or", v, 2); }

// ---- Integer atomics. There are none on floats: results would depend on the order.
namespace emu {
void before_atomic(const void* p, size_t bytes, bool ordered, Site site);
template <class T, class F>
MOA_UNTRACED __attribute__((noinline)) T atomic(T* p, F change) {
  static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "32- or 64-bit integers");
  before_atomic(p, sizeof(T), false, MOA_SITE);
  const T old = *p;
  *p = change(old);
  return old;
}
template <class T>
struct Same {
  using type = T;
};
template <class T>
using Exactly = typename Same<T>::type;  // not deduced: the value converts to the pointee's type
}  // namespace emu
#define MOA_ATOMIC(name, expression)                             \
  template <class T>                                             \
  MOA_INLINE T name(T* p, emu::Exactly<T> v) {                   \
    return emu::atomic(p, [v](T old) { return T(expression); }); \
  }
MOA_ATOMIC(atomicAdd, old + v)
MOA_ATOMIC(atomicSub, old - v)
MOA_ATOMIC(atomicMin, old < v ? old : v)
MOA_ATOMIC(atomicMax, old > v ? old : v)
MOA_ATOMIC(atomicAnd, old& v)
MOA_ATOMIC(atomicOr, old | v)
MOA_ATOMIC(atomicXor, old ^ v)
MOA_ATOMIC(atomicExch, (static_cast<void>(old), v))
MOA_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
MOA_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef MOA_ATOMIC
template <class T>
MOA_INLINE T atomicCAS(T* p, emu::Exactly<T> expected, emu::Exactly<T> v) {
  return emu::atomic(p, [expected, v](T old) { return old == expected ? v : old; });
}

// ---- Counters between blocks: device.cuh's own words.
namespace moa {
MOA_UNTRACED __attribute__((noinline)) inline uint32_t arrive(uint32_t* counter) {
  emu::before_atomic(counter, sizeof *counter, true, MOA_SITE);
  return (*counter)++;
}
__attribute__((noinline)) inline void await(const uint32_t* counter, uint32_t value) {
  emu::spin_until(counter, value, MOA_SITE);
}
}  // namespace moa

[[noreturn]] MOA_INLINE void __trap() { emu::fail(MOA_SITE, "__trap()"); }
