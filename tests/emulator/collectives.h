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
MOA_INLINE unsigned long long to_word(T value) {
  unsigned long long word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}
template <class T>
MOA_INLINE T from_word(unsigned long long word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}
unsigned long long shuffle_bits(const char* name, unsigned mask, unsigned long long value, int from);
template <class T>
MOA_INLINE T shuffle(const char* name, unsigned mask, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "as CUDA's");
  return from_word<T>(shuffle_bits(name, mask, to_word(value), from));
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
enum class Vote { ballot, any, all, match, add, bit_and, bit_or, least, most, least_unsigned, most_unsigned };
unsigned vote(const char* name, unsigned mask, unsigned long long value, Vote kind);
}  // namespace emu

MOA_INLINE unsigned __ballot_sync(unsigned m, int v) {
  return emu::vote("__ballot_sync", m, v != 0, emu::Vote::ballot);
}
MOA_INLINE int __any_sync(unsigned m, int v) { return int(emu::vote("__any_sync", m, v != 0, emu::Vote::any)); }
MOA_INLINE int __all_sync(unsigned m, int v) { return int(emu::vote("__all_sync", m, v != 0, emu::Vote::all)); }
template <class T>
MOA_INLINE unsigned __match_any_sync(unsigned m, T v) {
  return emu::vote("__match_any_sync", m, emu::to_word(v), emu::Vote::match);
}
MOA_INLINE unsigned __reduce_add_sync(unsigned m, unsigned v) {
  return emu::vote("__reduce_add", m, v, emu::Vote::add);
}
MOA_INLINE int __reduce_add_sync(unsigned m, int v) {
  return int(emu::vote("__reduce_add", m, unsigned(v), emu::Vote::add));
}
MOA_INLINE unsigned __reduce_and_sync(unsigned m, unsigned v) {
  return emu::vote("__reduce_and", m, v, emu::Vote::bit_and);
}
MOA_INLINE unsigned __reduce_or_sync(unsigned m, unsigned v) {
  return emu::vote("__reduce_or", m, v, emu::Vote::bit_or);
}
MOA_INLINE unsigned __reduce_min_sync(unsigned m, unsigned v) {
  return emu::vote("__reduce_min", m, v, emu::Vote::least_unsigned);
}
MOA_INLINE int __reduce_min_sync(unsigned m, int v) {
  return int(emu::vote("__reduce_min", m, unsigned(v), emu::Vote::least));
}
MOA_INLINE unsigned __reduce_max_sync(unsigned m, unsigned v) {
  return emu::vote("__reduce_max", m, v, emu::Vote::most_unsigned);
}
MOA_INLINE int __reduce_max_sync(unsigned m, int v) {
  return int(emu::vote("__reduce_max", m, unsigned(v), emu::Vote::most));
}

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
