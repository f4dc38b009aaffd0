// ldmatrix and mma, computed by the last lane for all.
#include "emulator/fragments.h"

#include "emulator/internal.h"

namespace emu {

template <int Matrices, bool Transposed>
void load_matrices(void* const* slots, unsigned mask, Site site) {
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
template void load_matrices<2, false>(void* const*, unsigned, Site);
template void load_matrices<2, true>(void* const*, unsigned, Site);
template void load_matrices<4, false>(void* const*, unsigned, Site);
template void load_matrices<4, true>(void* const*, unsigned, Site);

namespace {

using Four = float __attribute__((vector_size(16)));

// The fragments of a warp as matrices. Work memory, hence not initialised.
template <int K>
struct Matrices {
  alignas(16) float a[16][K], b[K][8], c[16][8];

  // Registers are on the stacks; elsewhere they are memory as any other.
  static void touch([[maybe_unused]] const Product& p, [[maybe_unused]] Site site) {
#ifdef MOA_EMULATE_TSAN
    if (!on_stack(p.a)) MOA_RECORD(p.a, 16, kRead, site);
    if (!on_stack(p.b)) MOA_RECORD(p.b, 8, kRead, site);
    if (!on_stack(p.c)) MOA_RECORD(p.c, 16, kWrite, site);
#endif
  }

  // Every sum takes its products one by one, k ascending.
  void multiply(void* const* slots, Site site) {
    for (int lane = 0; lane < 32; ++lane) {
      const Product& p = *static_cast<Product*>(slots[lane]);
      touch(p, site);
      const int g = lane / 4, t = lane % 4;
      memcpy(&c[g][2 * t], p.c, 8);
      memcpy(&c[g + 8][2 * t], p.c + 2, 8);
    }
    for (int g = 0; g < 16; ++g) {
      Four left, right;
      memcpy(&left, &c[g][0], 16);
      memcpy(&right, &c[g][4], 16);
      for (int k = 0; k < K; ++k) {
        const float x = a[g][k];
        const Four row = {x, x, x, x};
        left = left + row * *reinterpret_cast<const Four*>(&b[k][0]);
        right = right + row * *reinterpret_cast<const Four*>(&b[k][4]);
      }
      memcpy(&c[g][0], &left, 16);
      memcpy(&c[g][4], &right, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* to = static_cast<Product*>(slots[lane])->c;
      const int g = lane / 4, t = lane % 4;
      memcpy(to, &c[g][2 * t], 8);
      memcpy(to + 2, &c[g + 8][2 * t], 8);
    }
  }
};

}  // namespace

template <class T>
void mma_16816(void* const* slots, unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail(site, "mma needs all 32 lanes, these came: %08x", mask);
  Matrices<16> all __attribute__((uninitialized));
  const auto lo = [](uint32_t bits) { return float(emu::bits<T>(static_cast<uint16_t>(bits))); };
  const auto hi = [](uint32_t bits) { return float(emu::bits<T>(static_cast<uint16_t>(bits >> 16))); };
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* to = &all.a[g + i % 2 * 8][2 * t + i / 2 * 8];
      to[0] = lo(p.a[i]);
      to[1] = hi(p.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      all.b[2 * t + i * 8][g] = lo(p.b[i]);
      all.b[2 * t + i * 8 + 1][g] = hi(p.b[i]);
    }
  }
  all.multiply(slots, site);
}
template void mma_16816<__nv_bfloat16>(void* const*, unsigned, Site);
template void mma_16816<__half>(void* const*, unsigned, Site);

void mma_1688_tf32(void* const* slots, unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail(site, "mma needs all 32 lanes, these came: %08x", mask);
  Matrices<8> all __attribute__((uninitialized));
  const auto cut = [](uint32_t bits) { return emu::bits<float>(bits & 0xffffe000u); };  // what the hardware reads
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) all.a[g + i % 2 * 8][t + i / 2 * 4] = cut(p.a[i]);
    for (int i = 0; i < 2; ++i) all.b[t + i * 4][g] = cut(p.b[i]);
  }
  all.multiply(slots, site);
}

}  // namespace emu
