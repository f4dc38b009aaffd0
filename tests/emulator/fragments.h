// The emulated side of device.cuh's copies, ldmatrix and mma, with the fragment layouts of the PTX manual.
#pragma once
#include <type_traits>

#include "emulator/collectives.h"
#include "emulator/types.h"

namespace emu {
struct Rows {  // a lane's part in ldmatrix
  const void* row;
  unsigned* r;
};
template <int Matrices, bool Transposed>
void load_matrices(void* const* slots, unsigned mask, Site site);

struct Product {  // a lane's part in mma: c [16, 8] += a [16, K] b [K, 8]
  float* c;
  const uint32_t *a, *b;
};
template <class T>
void mma_16816(void* const* slots, unsigned mask, Site site);
void mma_1688_tf32(void* const* slots, unsigned mask, Site site);
}  // namespace emu

namespace moa {

MOA_INLINE void cp_async_16(void* shared, const void* global, bool valid) {
  emu::copy_async(shared, global, 16, valid);
}
MOA_INLINE void cp_async_commit() { emu::copy_commit(); }
MOA_INLINE void prefetch_l2(const void*) {}
MOA_INLINE void next_may_begin() {}
MOA_INLINE void await_launch() { emu::launch_in_front_ended(); }
MOA_INLINE uint4 load_once(const void* global, bool valid) {
  return valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
}
template <int N>
MOA_INLINE void cp_async_wait() {
  emu::copy_wait(N);
}

#define MOA_LDMATRIX(name, matrices, transposed)                                              \
  MOA_INLINE void name(uint32_t (&r)[matrices], const void* row) {                            \
    emu::Rows lane{row, r};                                                                   \
    emu::warp_operation(#name, 0xffffffffu, &lane, emu::load_matrices<matrices, transposed>); \
  }
MOA_LDMATRIX(ldmatrix_x2, 2, false)
MOA_LDMATRIX(ldmatrix_x2_trans, 2, true)
MOA_LDMATRIX(ldmatrix_x4, 4, false)
MOA_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef MOA_LDMATRIX

template <class T>
MOA_INLINE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value, "bfloat16 or float16");
  emu::Product lane{c, a, b};
  emu::warp_operation("mma_m16n8k16", 0xffffffffu, &lane, emu::mma_16816<T>);
}
template <class V>
MOA_INLINE void keep(V&) {}
inline uint32_t to_tf32(float v) {
  const uint32_t u = emu::bits<uint32_t>(v);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}
MOA_INLINE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::Product lane{c, a, b};
  emu::warp_operation("mma_m16n8k8_tf32", 0xffffffffu, &lane, emu::mma_1688_tf32);
}

}  // namespace moa
