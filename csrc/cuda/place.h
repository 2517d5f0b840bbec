// Where a CUDA entry point works, and what its kernels take: shared by every op's interface, host code only.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace topgather {

struct CudaPlace {
  int device;
  void* stream;  // cudaStream_t of the caller
};

// Memory on the device that an op may use while it runs.
struct CudaWorkspace {
  void* data;     // [bytes] uint8, 256-byte aligned
  int64_t bytes;  // at least what the op's workspace function says
};

// What a large kernel takes of a multiprocessor beside registers, for the table in docs/kernels.md.
struct CudaKernelFacts {
  const char* name;
  Dtype dtype;
  int64_t max_head_dim;  // of the instantiation; 0 where it has none
  int64_t threads;
  int64_t shared_bytes;  // dynamic, a thread block
};

}  // namespace topgather
