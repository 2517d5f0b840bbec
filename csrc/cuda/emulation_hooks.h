// Tells the emulator (tests/emulation) which memory an entry point's kernels may touch. Nothing in a real build.
//
//   cuda::DeclaredMemory memory;                      // for as long as the entry point runs
//   memory.add(address, num_bytes, cuda::MemoryKind::kInput);
//
// In the emulated build every access of a kernel must lie in what was declared, inputs may not be written, and outputs
// and workspace are filled with NaN first, so that nothing depends on what they held. Zero bytes may be declared.
#pragma once

#include <cstddef>

#if defined(TOPGATHER_EMULATION)
#include "emulation.h"
#endif

namespace topgather::cuda {

#if defined(TOPGATHER_EMULATION)

using emulation::MemoryKind;

class DeclaredMemory {
 public:
  DeclaredMemory() = default;
  ~DeclaredMemory() { emulation::forget_memory(); }
  DeclaredMemory(const DeclaredMemory&) = delete;
  DeclaredMemory& operator=(const DeclaredMemory&) = delete;
  void add(const void* address, size_t num_bytes, MemoryKind kind) {
    emulation::declare_memory(address, num_bytes, kind);
  }
};

#else

enum class MemoryKind { kInput, kOutput, kWorkspace, kInOut };

class DeclaredMemory {
 public:
  void add(const void*, size_t, MemoryKind) {}
};

#endif

}  // namespace topgather::cuda
