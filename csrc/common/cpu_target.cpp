#include "cpu_target.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace topgather {
namespace {

#if defined(TOPGATHER_HAVE_X86_TARGETS)
// The matrix unit's registers are large, so Linux grants them only to a process that requests them.
bool request_amx_from_kernel() {
#if defined(__linux__)
  constexpr long kArchRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool processor_has_amx_bf16() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned int kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return (d & kAmxBf16) != 0 && (d & kAmxTile) != 0;
}
#endif

std::vector<CpuTarget> detect() {
  std::vector<CpuTarget> targets{CpuTarget::kBaseline};
#if defined(TOPGATHER_HAVE_X86_TARGETS)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return targets;
  targets.push_back(CpuTarget::kAvx2);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return targets;
  }
  targets.push_back(CpuTarget::kAvx512);
  if (!__builtin_cpu_supports("avx512bf16")) return targets;
  bool has_amx = false;
#if defined(TOPGATHER_HAVE_AMX)
  has_amx = processor_has_amx_bf16() && request_amx_from_kernel();
#endif
#if defined(TOPGATHER_HAVE_AVX512_BF16)
  // Of products in bfloat16 AMD's processors issue as many a cycle as of multiply-adds, twice the work. Intel's issue
  // half as many, which gains nothing: there the target is offered only below a better one.
  if (has_amx || __builtin_cpu_is("amd")) targets.push_back(CpuTarget::kAvx512Bf16);
#endif
  if (has_amx) targets.push_back(CpuTarget::kAmx);
#endif
  return targets;
}

std::atomic<CpuTarget>& selected() {
  static std::atomic<CpuTarget> target{available_cpu_targets().back()};
  return target;
}

}  // namespace

std::vector<CpuTarget> available_cpu_targets() {
  static const std::vector<CpuTarget> targets = detect();
  return targets;
}

std::string name_of(CpuTarget target) {
  switch (target) {
    case CpuTarget::kBaseline: return "baseline";
    case CpuTarget::kAvx2: return "avx2";
    case CpuTarget::kAvx512: return "avx512";
    case CpuTarget::kAvx512Bf16: return "avx512_bf16";
    case CpuTarget::kAmx: return "amx";
  }
  return "unknown";
}

CpuTarget cpu_target() { return selected().load(std::memory_order_relaxed); }

bool multiplies_bytes() {
#if defined(TOPGATHER_HAVE_X86_TARGETS)
  static const bool result = __builtin_cpu_supports("avx512vnni") != 0;
  return result;
#else
  return false;
#endif
}

void set_cpu_target(const std::string& name) {
  std::string names;
  for (const CpuTarget target : available_cpu_targets()) {
    if (name_of(target) == name) {
      selected().store(target, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + name_of(target);
  }
  throw std::invalid_argument("cpu target: got '" + name + "', this machine and build offer " + names);
}

}  // namespace topgather
