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
MOA_UNTRACED void load_matrices(void* const* slots, unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail(site, "ldmatrix needs all 32 lanes, these came: %08x", mask);
  for (int m = 0; m < Matrices; ++m) {
    const void* rows[8];
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = static_cast<Rows*>(slots[8 * m + i])->row;
      check_shared(rows[i], 16, 16, "a row of ldmatrix", site);
      MOA_RECORD(rows[i], 16, kRead, site);
      memcpy(matrix[i], rows[i], 16);
    }
    count_conflicts(rows, 8, 16, site);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint32_t lo = Transposed ? matrix[t][g] : matrix[g][t];
      const uint32_t hi = Transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<Rows*>(slots[lane])->r[m] = lo | hi << 16;
    }
  }
}

struct Product {  // a lane's part in mma
  float* c;
  const uint32_t *a, *b;
};
// c [16, 8] += a [16, K] b [K, 8], from and to the lanes' registers.
template <int K, class Gather>
void multiply(void* const* slots, Gather gather) {
  float a[16][K], b[8][K];
  for (int lane = 0; lane < 32; ++lane) gather(*static_cast<Product*>(slots[lane]), lane / 4, lane % 4, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    float* c = static_cast<Product*>(slots[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const float *row = a[g + i / 2 * 8], *column = b[2 * t + i % 2];
      for (int k = 0; k < K; ++k) c[i] += row[k] * column[k];
    }
  }
}
template <class T>
void mma_16816(void* const* slots, unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail(site, "mma needs all 32 lanes, these came: %08x", mask);
  multiply<16>(slots, [](const Product& p, int g, int t, float (*a)[16], float (*b)[16]) {
    const auto put = [](uint32_t bits, float* to) {
      to[0] = float(emu::bits<T>(static_cast<uint16_t>(bits)));
      to[1] = float(emu::bits<T>(static_cast<uint16_t>(bits >> 16)));
    };
    for (int i = 0; i < 4; ++i) put(p.a[i], &a[g + i % 2 * 8][2 * t + i / 2 * 8]);
    for (int i = 0; i < 2; ++i) put(p.b[i], &b[g][2 * t + i * 8]);
  });
}
inline void mma_1688_tf32(void* const* slots, unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail(site, "mma needs all 32 lanes, these came: %08x", mask);
  multiply<8>(slots, [](const Product& p, int g, int t, float (*a)[8], float (*b)[8]) {
    const auto cut = [](uint32_t bits) { return emu::bits<float>(bits & 0xffffe000u); };  // what the hardware reads
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = cut(p.a[i]);
    for (int i = 0; i < 2; ++i) b[g][t + i * 4] = cut(p.b[i]);
  });
}
}  // namespace emu

namespace moa {

MOA_INLINE void cp_async_16(void* shared, const void* global, bool valid) {
  emu::copy_async(shared, global, 16, valid);
}
MOA_INLINE void cp_async_commit() { emu::copy_commit(); }
MOA_INLINE void prefetch_l2(const void*) {}
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
