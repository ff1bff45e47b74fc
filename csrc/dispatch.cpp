#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sadcl {

// A table of one instruction set, made inside its namespace, where names mean that copy's functions.
#define SADCL_POINTER(result, name, arguments) name,
#define SADCL_TABLE(isa) const KernelTable table = {#isa, SADCL_KERNELS(SADCL_POINTER)};

namespace portable {
SADCL_TABLE(portable)
}
#if defined(SADCL_HAS_AVX2)
namespace avx2 {
SADCL_KERNELS(SADCL_DECLARE)
SADCL_TABLE(avx2)
}  // namespace avx2
#endif
#if defined(SADCL_HAS_AVX512)
namespace avx512 {
SADCL_KERNELS(SADCL_DECLARE)
SADCL_TABLE(avx512)
}  // namespace avx512
#endif
#if defined(SADCL_HAS_AVX512_POPCNT)  // a copy of the losses that count labels alone
namespace avx512_popcnt {
using namespace avx512;
SADCL_MLC_KERNELS(SADCL_DECLARE)
SADCL_TABLE(avx512_popcnt)
}  // namespace avx512_popcnt
#endif
#if defined(SADCL_HAS_AVX512_BF16)  // a copy of what multiplies bfloat16 by bfloat16
namespace avx512_bf16 {
using namespace avx512;
SADCL_SSCL_KERNELS(SADCL_DECLARE)
SADCL_MLC_KERNELS(SADCL_DECLARE)
SADCL_ATTENTION_KERNELS(SADCL_DECLARE)
SADCL_TABLE(avx512_bf16)
}  // namespace avx512_bf16
#endif

namespace {

struct Candidate {
  const KernelTable& table;
  bool (*runs_here)();
};

#if defined(SADCL_HAS_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
bool has_popcnt() { return has_avx512() && __builtin_cpu_supports("avx512vpopcntdq"); }
#endif

const Candidate kCandidates[] = {
#if defined(SADCL_HAS_AVX512_BF16)
    {avx512_bf16::table, [] { return has_popcnt() && __builtin_cpu_supports("avx512bf16"); }},
#endif
#if defined(SADCL_HAS_AVX512_POPCNT)
    {avx512_popcnt::table, has_popcnt},
#endif
#if defined(SADCL_HAS_AVX512)
    {avx512::table, has_avx512},
#endif
#if defined(SADCL_HAS_AVX2)
    {avx2::table, [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")); }},
#endif
    {portable::table, [] { return true; }},
};

std::atomic<const KernelTable*> in_use{nullptr};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// The table of that name; `asked` says who wants it.
const KernelTable* find(const char* asked, const std::string& name) {
  std::string why;
  for (const Candidate& c : kCandidates) {
    if (name != c.table.isa) continue;
    if (c.runs_here()) return &c.table;
    why = " (which this processor cannot run)";
  }
  throw std::invalid_argument(std::string(asked) + ": expected one of " + joined(supported_isas()) + ", got '" + name +
                              "'" + why);
}

const KernelTable* choose() {
  const char* forced = std::getenv("SADCL_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return find("SADCL_CPU_ISA", forced);
  for (const Candidate& c : kCandidates)
    if (c.runs_here()) return &c.table;
  return nullptr;  // not reached: portable runs everywhere
}

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = in_use.load(std::memory_order_acquire);
  if (table == nullptr) {  // several threads may get here at once: they store the same
    table = choose();
    in_use.store(table, std::memory_order_release);
  }
  return *table;
}

void set_isa(const std::string& name) { in_use.store(find("isa", name), std::memory_order_release); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : kCandidates)
    if (c.runs_here()) names.push_back(c.table.isa);
  return names;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : kCandidates) names.push_back(c.table.isa);
  return names;
}

}  // namespace sadcl
