// What every launcher needs: kernel launches, and what host.h has.
//
// A kernel takes one argument, a struct by value, and is launched through `cuda::launch` alone. Under a host compiler
// the launch runs the kernel in the emulator (tests/emulation).
#pragma once

#include <cstddef>
#include <type_traits>

#include "host.h"

#if !defined(__CUDACC__)
#include "emulation.h"
#endif

namespace topgather {
namespace cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;  // dynamic shared memory of a block
  cudaStream_t stream;
};

// Shared memory that a kernel may use without opting in.
constexpr size_t kSharedBytesWithoutOptIn = 48 * 1024;

// Queues the kernel on the stream; throws std::runtime_error if it cannot be.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const LaunchShape& shape, const std::type_identity_t<Arguments>& arguments) {
  static_assert(std::is_trivially_copyable_v<Arguments>, "kernel arguments are copied byte by byte");
  if (shape.shared_bytes > kSharedBytesWithoutOptIn) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  }
#if defined(__CUDACC__)
  kernel<<<shape.grid, shape.block, shape.shared_bytes, shape.stream>>>(arguments);
#else
  emulation::launch(kernel, shape.grid, shape.block, shape.shared_bytes, arguments);
#endif
  cuda_require(cudaGetLastError(), "launching a kernel");
}

}  // namespace cuda
}  // namespace topgather
