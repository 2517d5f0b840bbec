// Small kernels that show what the emulator does: each primitive alone, and planted faults.
#pragma once

#include <cstdint>

namespace topgather::micro {

struct MicroArguments {
  const void* a;
  const void* b;
  void* output;
  int64_t option;
};

using MicroKernel = void (*)(MicroArguments);

struct NamedKernel {
  const char* name;
  MicroKernel kernel;
};

// Each ends with an entry whose name is null.
extern const NamedKernel kPrimitiveKernels[];
extern const NamedKernel kFaultKernels[];

}  // namespace topgather::micro
