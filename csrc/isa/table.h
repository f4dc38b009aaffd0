// The kernels of one instruction set, and the choice among the sets compiled in.
#pragma once
#include "lora/lora.h"
#include "routing/routing.h"

namespace moa {

struct KernelTable {
  const char* name;
  void (*topk)(const TopkParams&);
  void (*topk_backward)(const TopkBackwardParams&);
  void (*router)(const RouterParams&);
  void (*router_backward)(const RouterBackwardParams&);
  void (*forward)(const ForwardParams&);
  // The base's product where the library's GEMM is slower, and its gradient: false, and nothing done, where it is not.
  bool (*own_linear)(DType type, int64_t tokens, int64_t in, int64_t out);
  void (*linear)(const LinearParams&);
  bool (*linear_backward)(const LinearBackwardParams&);
  void (*backward_shrink)(const BackwardParams&);
  void (*backward_outer)(const BackwardParams&);
};

// Every set compiled into this binary, weakest first, ended by null.
extern const KernelTable* const kCompiledTables[];
// Whether this processor, and the system's handling of its registers, can run the set.
bool cpu_can_run(const char* name);

// The set in use: the strongest this machine runs, or the one MOA_CPU_ISA or set_cpu_isa names.
const KernelTable& kernels();
// False, and nothing changes, when the name is not compiled in or the machine cannot run it.
bool set_cpu_isa(const char* name);
// What is wrong with MOA_CPU_ISA, or null.
const char* cpu_isa_problem();

}  // namespace moa
