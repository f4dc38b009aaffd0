// Bank conflicts by kernel, for module.cpp.
#pragma once
#include <map>
#include <string>
#include <utility>

#include "emulator/runtime.h"

namespace emu {
struct Conflicts {
  long long requests = 0, extra_cycles = 0;
};
std::map<std::pair<std::string, Site>, Conflicts> take_conflicts();  // by kernel and source line, since the last call
}  // namespace emu
