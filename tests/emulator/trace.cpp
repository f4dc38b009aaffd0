// The build "tsan": the functions that the compiler calls before every access of a kernel. They feed the race detector
// and count the bank conflicts of plain loads and stores.
#include <array>
#include <vector>

#include "emulator/conflicts.h"
#include "emulator/internal.h"

namespace emu {
namespace {

// Accesses of one instruction by the lanes of one warp: the n-th of each lane since the warp last met belong together.
struct Instruction {
  Site site;
  unsigned bytes;
  bool write;
  std::array<unsigned, 32> count{};
  std::vector<std::array<const void*, 32>> rounds;
};
std::vector<Instruction> open[kMaxResidents][32];  // by warp, in the order of their first execution
unsigned last[kMaxResidents][32][32];              // of each lane, its last one there

void count_bank_access(const void* p, size_t bytes, bool write, Site site) {
  auto& instructions = open[resident][self->warp->number];
  // Mostly the one behind this lane's last one.
  size_t at = last[resident][self->warp->number][self->lane] + 1;
  if (at >= instructions.size() || instructions[at].site != site) {
    for (at = 0; at < instructions.size() && instructions[at].site != site;) ++at;
    if (at == instructions.size()) instructions.push_back({site, static_cast<unsigned>(bytes), write, {}, {}});
  }
  last[resident][self->warp->number][self->lane] = static_cast<unsigned>(at);
  Instruction& found = instructions[at];
  const unsigned round = found.count[self->lane]++;
  if (round == found.rounds.size()) found.rounds.push_back({});
  found.rounds[round][self->lane] = p;
}

// The compiler takes the copy of a float4 apart: `next` goes on where `first` ended, in every lane of every round, and
// the whole is as aligned as a vector is.
bool continues(const Instruction& first, unsigned bytes, const Instruction& next) {
  const unsigned whole = bytes + next.bytes;
  if (next.write != first.write || next.rounds.size() != first.rounds.size() || whole > 16) return false;
  const unsigned aligned = whole <= 8 ? 8 : 16;
  for (size_t r = 0; r < first.rounds.size(); ++r) {
    for (unsigned l = 0; l < 32; ++l) {
      const auto* p = static_cast<const char*>(first.rounds[r][l]);
      if (p == nullptr ? next.rounds[r][l] != nullptr : next.rounds[r][l] != p + bytes) return false;
      if (reinterpret_cast<uintptr_t>(p) % aligned != 0) return false;
    }
  }
  return same_line(first.site, next.site);
}

void access(const void* p, size_t bytes, bool write, bool aligned, Site site) {
  if (self == nullptr) return;
  if (aligned && reinterpret_cast<uintptr_t>(p) % bytes != 0 && region_of(p).begin != nullptr) {
    fail(site, "a misaligned access of %zu bytes", bytes);
  }
  record_access(p, bytes, write ? kWrite : kRead, site);
  if (bytes <= 16 && is_shared(p)) count_bank_access(p, bytes, write, site);
}

}  // namespace

void trace_warp_met(const Warp& warp) {
  auto& instructions = open[resident][warp.number];
  for (size_t i = 0; i < instructions.size();) {
    const Instruction& first = instructions[i];
    unsigned bytes = first.bytes;
    size_t next = i + 1;
    while (next < instructions.size() && continues(first, bytes, instructions[next])) {
      bytes += instructions[next++].bytes;
    }
    for (const auto& round : first.rounds) count_conflicts(round.data(), 32, bytes, first.site);
    i = next;
  }
  instructions.clear();
}

}  // namespace emu

#define MOA_HOOK(name, bytes, write, aligned)                               \
  extern "C" void name(void* p) {                                           \
    if (!emu::on_stack(p)) emu::access(p, bytes, write, aligned, MOA_SITE); \
  }
#define MOA_HOOKS(bytes)                                      \
  MOA_HOOK(__tsan_read##bytes, bytes, false, true)            \
  MOA_HOOK(__tsan_write##bytes, bytes, true, true)            \
  MOA_HOOK(__tsan_unaligned_read##bytes, bytes, false, false) \
  MOA_HOOK(__tsan_unaligned_write##bytes, bytes, true, false)
MOA_HOOKS(1)
MOA_HOOKS(2)
MOA_HOOKS(4)
MOA_HOOKS(8)
MOA_HOOKS(16)
extern "C" {
void __tsan_read_range(void* p, size_t bytes) {
  if (!emu::on_stack(p)) emu::access(p, bytes, false, false, MOA_SITE);
}
void __tsan_write_range(void* p, size_t bytes) {
  if (!emu::on_stack(p)) emu::access(p, bytes, true, false, MOA_SITE);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
