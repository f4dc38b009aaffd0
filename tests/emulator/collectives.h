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
struct Votes {
  static void ballot(void* const*, unsigned, Site), any(void* const*, unsigned, Site), all(void* const*, unsigned, Site);
  static void match(void* const*, unsigned, Site), add(void* const*, unsigned, Site);
  static void bit_and(void* const*, unsigned, Site), bit_or(void* const*, unsigned, Site);
  static void least(void* const*, unsigned, Site), most(void* const*, unsigned, Site);
  static void least_unsigned(void* const*, unsigned, Site), most_unsigned(void* const*, unsigned, Site);
};
unsigned vote(const char* name, unsigned mask, unsigned long long value, Combine combine);
}  // namespace emu

#define MOA_VOTE(name, T, R, value, combine) \
  MOA_INLINE R name(unsigned m, T v) { return R(emu::vote(#name, m, value, emu::Votes::combine)); }
MOA_VOTE(__ballot_sync, int, unsigned, v != 0, ballot)
MOA_VOTE(__any_sync, int, int, v != 0, any)
MOA_VOTE(__all_sync, int, int, v != 0, all)
template <class T>
MOA_VOTE(__match_any_sync, T, unsigned, emu::to_word(v), match)
MOA_VOTE(__reduce_add_sync, unsigned, unsigned, v, add)
MOA_VOTE(__reduce_add_sync, int, int, unsigned(v), add)
MOA_VOTE(__reduce_and_sync, unsigned, unsigned, v, bit_and)
MOA_VOTE(__reduce_or_sync, unsigned, unsigned, v, bit_or)
MOA_VOTE(__reduce_min_sync, unsigned, unsigned, v, least_unsigned)
MOA_VOTE(__reduce_min_sync, int, int, unsigned(v), least)
MOA_VOTE(__reduce_max_sync, unsigned, unsigned, v, most_unsigned)
MOA_VOTE(__reduce_max_sync, int, int, unsigned(v), most)
#undef MOA_VOTE

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
