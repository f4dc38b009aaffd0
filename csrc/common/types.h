// Plain types shared by every kernel. Nothing here, or in routing/ and lora/, knows torch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace moa {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Storage-only half types: kernels convert them, or feed them to instructions that take them as bits.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

}  // namespace moa
