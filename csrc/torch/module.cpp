// The Python module moa_ops._C. It is empty: importing it loads this library, whose operators register themselves.
// One of them is here: torch.ops.moa_ops.build_info() -> str, what was built into this binary, as JSON that
// CMakeLists.txt writes and `python -m moa_ops.info` prints.
#include <Python.h>

#include <string>

#include <torch/csrc/stable/library.h>

#include "moa_build_info.h"

static std::string build_info() { return MOA_BUILD_INFO; }

STABLE_TORCH_LIBRARY_FRAGMENT(moa_ops, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(moa_ops, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
