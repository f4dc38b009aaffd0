// Bank conflicts by kernel, for module.cpp.
#pragma once
#include <map>
#include <string>

namespace emu {
struct Conflicts {
  long long accesses = 0, extra_cycles = 0;
};
std::map<std::string, Conflicts>& conflicts();
}  // namespace emu
