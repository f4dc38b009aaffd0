#include "isa/table.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/processor.h"

namespace moa {

namespace scalar {
extern const KernelTable kTable;
}
#if defined(MOA_WITH_AVX2)
namespace avx2 {
extern const KernelTable kTable;
}
#endif
#if defined(MOA_WITH_AVX512)
namespace avx512 {
extern const KernelTable kTable;
}
#endif
#if defined(MOA_WITH_AVX512_BF16)
namespace avx512_bf16 {
extern const KernelTable kTable;
}
#endif
#if defined(MOA_WITH_AMX_BF16)
namespace amx_bf16 {
extern const KernelTable kTable;
}
#endif

const KernelTable* const kCompiledTables[] = {
    &scalar::kTable,
#if defined(MOA_WITH_AVX2)
    &avx2::kTable,
#endif
#if defined(MOA_WITH_AVX512)
    &avx512::kTable,
#endif
#if defined(MOA_WITH_AVX512_BF16)
    &avx512_bf16::kTable,
#endif
#if defined(MOA_WITH_AMX_BF16)
    &amx_bf16::kTable,
#endif
    nullptr,
};

bool cpu_can_run(const char* name) {
  if (strcmp(name, "scalar") == 0) return true;
#if defined(__x86_64__)
  // These also ask the operating system whether it saves the wide registers (XGETBV). F16C is not asked for: Clang knows
  // the name only from 19 on, and what has AVX2 has it.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (strcmp(name, "avx2") == 0) return avx2;
  if (strcmp(name, "avx512") == 0) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (strcmp(name, "avx512_bf16") == 0) return bf16;
  if (strcmp(name, "amx_bf16") == 0) return bf16 && processor().amx_bf16;
#endif
  return false;
}

namespace {

std::atomic<const KernelTable*> g_table{nullptr};

const KernelTable* find(const char* name) {
  for (const KernelTable* const* t = kCompiledTables; *t != nullptr; ++t)
    if (strcmp((*t)->name, name) == 0 && cpu_can_run(name)) return *t;
  return nullptr;
}

const KernelTable* choose() {
  const char* forced = std::getenv("MOA_CPU_ISA");
  if (forced != nullptr && *forced != 0) {
    const KernelTable* t = find(forced);
    if (t != nullptr) return t;
  }
  const KernelTable* best = &scalar::kTable;
  for (const KernelTable* const* t = kCompiledTables; *t != nullptr; ++t)
    if (cpu_can_run((*t)->name)) best = *t;
  return best;
}

}  // namespace

const KernelTable& kernels() {
  const KernelTable* t = g_table.load(std::memory_order_acquire);
  if (t == nullptr) {
    t = choose();
    g_table.store(t, std::memory_order_release);
  }
  return *t;
}

bool set_cpu_isa(const char* name) {
  const KernelTable* t = find(name);
  if (t != nullptr) g_table.store(t, std::memory_order_release);
  return t != nullptr;
}

const char* cpu_isa_problem() {
  const char* forced = std::getenv("MOA_CPU_ISA");
  return forced != nullptr && *forced != 0 && find(forced) == nullptr ? forced : nullptr;
}

}  // namespace moa
