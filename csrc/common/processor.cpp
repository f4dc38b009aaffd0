#include "common/processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moa {
namespace {

// Linux saves the tiles of a process that has asked for it (arch/x86 of its manual: XSTATE features), once for all
// of its threads.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Processor ask() {
  Processor result{};
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (__get_cpuid(0, &a, &b, &c, &d)) result.intel = b == signature_INTEL_ebx && d == signature_INTEL_edx;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    result.amx_bf16 = (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0 && may_use_tiles();
    result.avx512_fp16 = (d >> 23 & 1) != 0;
  }
#endif
  return result;
}

}  // namespace

const Processor& processor() {
  static const Processor known = ask();
  return known;
}

}  // namespace moa
