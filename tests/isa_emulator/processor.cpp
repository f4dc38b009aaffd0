// The processor of make isa-check: one that has every instruction set, in place of csrc/common/processor.cpp.
#include "common/processor.h"

namespace moa {

const Processor& processor() {
  static const Processor all{true, true, false};
  return all;
}

}  // namespace moa
