// AMX's tiles for bfloat16, as avx512.h: eight of up to 16 rows of 64 bytes, this thread's own. What the processor would
// answer with a fault stops here: a tile without a shape, and shapes that do not fit together.
#pragma once
#include "avx512.h"

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

namespace isa_emulator {
namespace {

struct Tile {
  int rows, bytes;  // of a row; 0: no shape
  alignas(64) unsigned char data[16][64];
};
inline Tile* tiles() {
  static thread_local Tile all[8] = {};
  return all;
}
inline Tile& shaped(int tile) {
  Tile& t = tiles()[tile];
  if (t.rows == 0 || t.bytes == 0) __builtin_trap();
  return t;
}

inline void tile_loadconfig(const void* memory) {
  const unsigned char* const palette = static_cast<const unsigned char*>(memory);
  if (palette[0] != 1) __builtin_trap();
  for (int tile = 0; tile < 8; ++tile) {
    uint16_t bytes;
    memcpy(&bytes, palette + 16 + 2 * tile, 2);
    const int rows = palette[48 + tile];
    if (rows > 16 || bytes > 64 || bytes % 4 != 0 || (rows == 0) != (bytes == 0)) __builtin_trap();
    tiles()[tile] = {rows, bytes, {}};
  }
}
inline void tile_release() {
  for (int tile = 0; tile < 8; ++tile) tiles()[tile] = {};
}
inline void tile_zero(int tile) { memset(shaped(tile).data, 0, sizeof(Tile::data)); }
inline void tile_loadd(int tile, const void* from, int64_t stride) {
  Tile& t = shaped(tile);
  memset(t.data, 0, sizeof t.data);
  for (int i = 0; i < t.rows; ++i)
    memcpy(t.data[i], static_cast<const char*>(from) + i * stride, static_cast<size_t>(t.bytes));
}
inline void tile_stored(int tile, void* to, int64_t stride) {
  const Tile& t = shaped(tile);
  for (int i = 0; i < t.rows; ++i) memcpy(static_cast<char*>(to) + i * stride, t.data[i], static_cast<size_t>(t.bytes));
}

// c[m][n] += sum over pairs k of a[m][k] b[k][n]: the firsts and the seconds of the pairs are summed apart.
inline void tile_dpbf16ps(int to, int left, int right) {
  Tile& c = shaped(to);
  const Tile &a = shaped(left), &b = shaped(right);
  if (to == left || to == right || left == right || a.rows != c.rows || a.bytes != 4 * b.rows || b.bytes != c.bytes)
    __builtin_trap();
  for (int m = 0; m < c.rows; ++m) {
    float sum[2][16] = {}, out[16];
    uint16_t x[32], y[32];
    memcpy(x, a.data[m], 64);
    memcpy(out, c.data[m], 64);
    for (int k = 0; k < b.rows; ++k) {
      memcpy(y, b.data[k], 64);
      for (int n = 0; n < c.bytes / 4; ++n) {
        sum[0][n] = added(sum[0][n], x[2 * k], y[2 * n]);
        sum[1][n] = added(sum[1][n], x[2 * k + 1], y[2 * n + 1]);
      }
    }
    for (int n = 0; n < c.bytes / 4; ++n) out[n] = flushed(flushed(out[n]) + flushed(sum[0][n] + sum[1][n]));
    memcpy(c.data[m], out, 64);
  }
}

}  // namespace
}  // namespace isa_emulator

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig isa_emulator::tile_loadconfig
#define _tile_release isa_emulator::tile_release
#define _tile_zero isa_emulator::tile_zero
#define _tile_loadd isa_emulator::tile_loadd
#define _tile_stored isa_emulator::tile_stored
#define _tile_dpbf16ps isa_emulator::tile_dpbf16ps
