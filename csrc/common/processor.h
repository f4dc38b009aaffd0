// What of the processor decides how fast the GEMMs of torch's libraries are, beside which plan.h weighs our own kernels.
#pragma once

namespace moa {

struct Processor {
  bool intel;        // where MKL takes its fastest float32 code
  bool amx_bf16;     // tiles for bfloat16, which oneDNN uses; the system lets this process use them
  bool avx512_fp16;  // arithmetic of float16, which oneDNN uses
};

const Processor& processor();

}  // namespace moa
