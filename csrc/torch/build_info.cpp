// torch.ops.moa_ops.build_info() -> str: what was built into this binary, as JSON (CMakeLists.txt writes it).
// `python -m moa_ops.info` prints it.
#include <string>

#include <torch/csrc/stable/library.h>

#include "moa_build_info.h"

namespace {

std::string build_info() { return MOA_BUILD_INFO; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(moa_ops, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(moa_ops, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
