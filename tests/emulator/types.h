// CUDA's vector and half types, as far as kernels use them: storage and conversions. Half arithmetic is left out on
// purpose: kernels compute in float.
#pragma once
#include <cstdint>
#include <cstring>

#define MOA_VECTOR(T, name, align)                                   \
  struct alignas(align / 2) name##2 { T x, y; };                     \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align) name##4 { T x, y, z, w; };                   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
MOA_VECTOR(float, float, 16)
MOA_VECTOR(int, int, 16)
MOA_VECTOR(short, short, 8)
MOA_VECTOR(unsigned short, ushort, 8)
MOA_VECTOR(unsigned char, uchar, 4)
#undef MOA_VECTOR
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

namespace emu {
template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float bfloat16_to_float(uint16_t b) { return bits<float>(uint32_t{b} << 16); }
inline uint16_t float_to_bfloat16(float v) {  // to nearest, ties to even
  const uint32_t u = bits<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Times 2^112: corrects the exponent's bias, and makes subnormals normal.
  return bits<float>(sign | bits<uint32_t>(bits<float>(rest << 13) * 0x1p112f));
}
inline uint16_t float_to_half(float v) {  // to nearest, ties to even
  const uint32_t u = bits<uint32_t>(v), sign = u >> 16 & 0x8000u, size = u & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (size < 0x38800000u) {  // below 2^-14: adding 2^-1 leaves units of 2^-24 in the low bits, rounded
    return static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(size) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13));
}
}  // namespace emu

#define MOA_HALF(name, to_float, from_float)                              \
  struct alignas(2) name {                                                \
    uint16_t raw;                                                         \
    name() = default;                                                     \
    name(float v) : raw(::emu::from_float(v)) {}                          \
    explicit operator float() const { return ::emu::to_float(raw); }      \
  };                                                                      \
  struct alignas(4) name##2 { name x, y; };                               \
  inline bool operator==(name a, name b) { return float(a) == float(b); } \
  inline bool operator<(name a, name b) { return float(a) < float(b); }   \
  inline bool operator>(name a, name b) { return float(a) > float(b); }
MOA_HALF(__nv_bfloat16, bfloat16_to_float, float_to_bfloat16)
MOA_HALF(__half, half_to_float, float_to_half)
#undef MOA_HALF
using nv_bfloat16 = __nv_bfloat16;
using half = __half;

inline float __bfloat162float(__nv_bfloat16 v) { return float(v); }
inline __nv_bfloat16 __float2bfloat16(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.raw; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return emu::bits<__nv_bfloat16>(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline float __half2float(__half v) { return float(v); }
inline __half __float2half(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline unsigned short __half_as_ushort(__half v) { return v.raw; }
inline __half __ushort_as_half(unsigned short v) { return emu::bits<__half>(v); }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
