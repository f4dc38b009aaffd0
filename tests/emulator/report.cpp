// Errors in words: the kernel, the block, the thread, and the source line behind a return address.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <map>

#include "emulator/internal.h"

namespace emu {

std::string failure;

namespace {

std::string base_name(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

// addr2line prints "function\nfile:line\n" for the innermost inlined function first.
std::string look_up(Site site) {
  Dl_info info;
  if (site == nullptr || dladdr(site, &info) == 0) return "an unknown line";
  char command[512];
  const size_t offset = static_cast<size_t>(static_cast<const char*>(site) - static_cast<char*>(info.dli_fbase)) - 1;
  snprintf(command, sizeof command, "env -u LD_PRELOAD addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "an unknown line";
  std::string lines;
  char line[1024];
  while (fgets(line, sizeof line, pipe) != nullptr) {
    std::string text(line);
    text = base_name(text.substr(0, text.find_first_of(" \n")));
    // The emulator's own inlined layers say nothing.
    if (text.rfind("collectives.h", 0) == 0 || text.rfind("fragments.h", 0) == 0 || text.rfind("runtime.h", 0) == 0) {
      continue;
    }
    lines += (lines.empty() ? "" : " < ") + text;
  }
  pclose(pipe);
  return lines.empty() ? "an unknown line" : lines;
}

}  // namespace

std::string describe(Site site) {
  static std::map<Site, std::string> known;
  auto found = known.find(site);
  if (found == known.end()) found = known.emplace(site, look_up(site)).first;
  return found->second;
}

bool same_line(Site a, Site b) { return a == b || describe(a) == describe(b); }

std::string thread_name(const Thread& t) {
  char text[64];
  snprintf(text, sizeof text, "thread (%u,%u,%u)", t.index.x, t.index.y, t.index.z);
  return text;
}

void fail(Site site, const char* format, ...) {
  char text[2048];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  char where[256];
  snprintf(where, sizeof where, "%s, block (%u,%u,%u), ", block.kernel, block.index.x, block.index.y, block.index.z);
  const std::string at = site == nullptr ? "" : ", at " + describe(site);
  failure = where + (self != nullptr ? thread_name(*self) : std::string("at its end")) + at + ": " + text;
  if (self == nullptr) throw std::runtime_error(failure);
  leave_launch();
}

}  // namespace emu
