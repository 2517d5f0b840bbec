// Which compiled instruction set runs on this machine.
#pragma once

#include <string>
#include <vector>

namespace topgather {

// In ascending order of preference. On ARM only the baseline (NEON) is built.
enum class CpuTarget : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// Targets that were compiled in and that this processor and operating system can run, ascending.
std::vector<CpuTarget> available_cpu_targets();
std::string name_of(CpuTarget target);

// The target in use: the best one available, or the one named last by set_cpu_target.
CpuTarget cpu_target();

// Whether this processor multiplies bytes four at a time (AVX-512 VNNI), which code for AVX-512 makes use of.
bool multiplies_bytes();

// Throws std::invalid_argument, naming what there is, for a name that is unknown or not available here.
void set_cpu_target(const std::string& name);

}  // namespace topgather
