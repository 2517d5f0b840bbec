// Planted faults. Each kernel is right with option 0 and wrong with option 1, so that the tests see both.
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/primitives.cuh"
#include "micro_kernels.h"

namespace topgather::micro {

constexpr unsigned kAll = 0xffffffffu;

__device__ inline float* shared_floats() { return reinterpret_cast<float*>(cuda::dynamic_shared_memory()); }
__device__ inline float* output_floats(const MicroArguments& args) { return static_cast<float*>(args.output); }

// Reads the neighbour's number before the barrier that publishes it.
__global__ void read_without_barrier(const MicroArguments args) {
  float* shared = shared_floats();
  shared[threadIdx.x] = 1.0f;
  if (args.option == 0) __syncthreads();
  output_floats(args)[threadIdx.x] = shared[(threadIdx.x + 33) % blockDim.x];
}

// Overwrites numbers that others may still read.
__global__ void overwrite_without_barrier(const MicroArguments args) {
  float* shared = shared_floats();
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    shared[threadIdx.x] = static_cast<float>(round);
    __syncthreads();
    sum += shared[(threadIdx.x + 33) % blockDim.x];
    if (args.option == 0) __syncthreads();
  }
  output_floats(args)[threadIdx.x] = sum;
}

// The same within a warp.
__global__ void read_without_sync_warp(const MicroArguments args) {
  float* shared = shared_floats();
  shared[threadIdx.x] = 0.0f;
  __syncwarp();
  shared[threadIdx.x] = 1.0f;
  if (args.option == 0) __syncwarp();
  output_floats(args)[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void overwrite_without_sync_warp(const MicroArguments args) {
  float* shared = shared_floats();
  shared[threadIdx.x] = 1.0f;
  __syncwarp();
  output_floats(args)[threadIdx.x] = shared[threadIdx.x ^ 1];
  if (args.option == 0) __syncwarp();
  shared[threadIdx.x] = 2.0f;
}

// A stage of asynchronous copies. 1: not waited for; 2: waited for after the barrier; 3: never waited for;
// 4: overwritten by the next stage while others may still read.
__global__ void copy_without_wait(const MicroArguments args) {
  auto* stage = reinterpret_cast<uint4*>(cuda::dynamic_shared_memory());
  const auto* source = static_cast<const uint4*>(args.a);
  cuda::copy_async_16(stage + threadIdx.x, source + threadIdx.x, true);
  cuda::copy_async_commit();
  if (args.option != 1 && args.option != 2 && args.option != 3) cuda::copy_async_wait<0>();
  __syncthreads();
  if (args.option == 2) cuda::copy_async_wait<0>();
  if (args.option != 3) static_cast<uint4*>(args.output)[threadIdx.x] = stage[(threadIdx.x + 40) % blockDim.x];
  if (args.option == 1) cuda::copy_async_wait<0>();
  if (args.option == 4) {
    cuda::copy_async_16(stage + threadIdx.x, source, true);
    cuda::copy_async_commit();
    cuda::copy_async_wait<0>();
  }
}

// Group counts: 0 waits for both of two groups, 1 leaves the second under way.
__global__ void copy_with_short_wait(const MicroArguments args) {
  auto* stage = reinterpret_cast<uint4*>(cuda::dynamic_shared_memory());
  const auto* source = static_cast<const uint4*>(args.a);
  for (unsigned group = 0; group < 2; ++group) {
    cuda::copy_async_16(stage + group * blockDim.x + threadIdx.x, source + threadIdx.x, true);
    cuda::copy_async_commit();
  }
  if (args.option == 0) {
    cuda::copy_async_wait<0>();
  } else {
    cuda::copy_async_wait<1>();
  }
  __syncthreads();
  static_cast<uint4*>(args.output)[threadIdx.x] = stage[blockDim.x + threadIdx.x];
  cuda::copy_async_wait<0>();
}

__global__ void divergent_barrier(const MicroArguments args) {
  if (args.option == 0 || threadIdx.x < 40) __syncthreads();
  output_floats(args)[threadIdx.x] = 1.0f;
}

__global__ void divergent_product(const MicroArguments args) {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (args.option == 0 || threadIdx.x != 7) {
    cuda::multiply_accumulate<BFloat16>(d, a, 0, 0);
  } else {
    d[0] = __shfl_xor_sync(kAll, 1.0f, 1);
  }
  output_floats(args)[threadIdx.x] = d[0];
}

// 1: one lane waits for another that waits for it at the barrier. 2: three lanes in a ring.
__global__ void deadlock(const MicroArguments args) {
  const unsigned lane = threadIdx.x - 32;
  if (args.option == 1 && lane == 1) output_floats(args)[0] = __shfl_sync(0x6u, 1.0f, 1);
  if (args.option == 2 && lane < 3) __syncwarp(lane == 0 ? 0x3u : lane == 1 ? 0x6u : 0x5u);
  __syncthreads();
  output_floats(args)[threadIdx.x] = 1.0f;
}

__global__ void shared_out_of_bounds(const MicroArguments args) {
  float* shared = shared_floats();
  shared[threadIdx.x] = 1.0f;
  __syncthreads();
  output_floats(args)[threadIdx.x] = shared[threadIdx.x + static_cast<unsigned>(args.option)];
}

// Reads a row past the last of a [blockDim, 4] float tensor; option 2 with an asynchronous copy, 3 writes.
__global__ void global_out_of_bounds(const MicroArguments args) {
  const auto* rows = static_cast<const float4*>(args.a);
  const unsigned row = threadIdx.x + (args.option != 0 ? 1 : 0);
  if (args.option == 2) {
    cuda::copy_async_16(cuda::dynamic_shared_memory() + threadIdx.x * 16, rows + row, true);
    cuda::copy_async_commit();
    cuda::copy_async_wait<0>();
  } else {
    output_floats(args)[args.option == 3 ? row : threadIdx.x] = rows[args.option == 3 ? threadIdx.x : row].y;
  }
}

__global__ void uninitialized_shared(const MicroArguments args) {
  float* shared = shared_floats();
  if (args.option == 0 || threadIdx.x != 9) shared[threadIdx.x] = 1.0f;
  __syncthreads();
  output_floats(args)[threadIdx.x] = shared[threadIdx.x];
}

// b is workspace: thread 9 does not write its number, or adds to one that nobody set.
__global__ void uninitialized_workspace(const MicroArguments args) {
  auto* workspace = static_cast<float*>(const_cast<void*>(args.b));
  if (args.option == 0 || threadIdx.x != 9) workspace[threadIdx.x] = 1.0f;
  if (args.option == 2) cuda::add_atomic(workspace + 9, 1.0f);
  output_floats(args)[threadIdx.x] = workspace[threadIdx.x];
}

__global__ void write_to_input(const MicroArguments args) {
  float* target = args.option == 0 ? output_floats(args) : static_cast<float*>(const_cast<void*>(args.a));
  target[threadIdx.x] = 1.0f;
}

// 1: two blocks write one number. 2: one reads what another wrote. 3: one writes what another read.
__global__ void race_between_blocks(const MicroArguments args) {
  float* output = output_floats(args);
  const unsigned own = blockIdx.x * blockDim.x + threadIdx.x;
  if (args.option == 1) {
    if (threadIdx.x == 0) output[0] = 1.0f;
  } else if (args.option == 2) {
    output[own] = 1.0f;
    output[own] = output[own % blockDim.x];
  } else if (args.option == 3) {
    const float first = static_cast<const float*>(args.b)[0];
    const_cast<float*>(static_cast<const float*>(args.b))[blockIdx.x] = first;
  } else {
    output[own] = 1.0f;
  }
}

// 1: plain additions by several threads. 2: atomic ones, read back at once by one of them. 3: one of them plain.
__global__ void lost_addition(const MicroArguments args) {
  float* output = output_floats(args);
  if (args.option == 1) {
    output[0] += 1.0f;
  } else if (args.option == 3 && threadIdx.x == 5) {
    output[0] += 1.0f;
  } else {
    cuda::add_atomic(output, 1.0f);
  }
  if (args.option == 2 && threadIdx.x == 31) output[1] = output[0];
}

// Lane 0 hands a number on to lane 2 through lane 1, by barriers of two lanes each. 1: lane 3 takes it without one.
__global__ void partial_barriers(const MicroArguments args) {
  float* shared = shared_floats();
  const unsigned lane = threadIdx.x;
  float result = 0.0f;
  if (lane == 0) shared[0] = 1.0f;
  if (lane < 2) __syncwarp(0x3u);
  if (lane == 1) result = shared[0];
  if (lane == 1 || lane == 2) __syncwarp(0x6u);
  if (lane == 2) shared[0] += 1.0f;
  if (lane == 3 && args.option != 0) result = shared[0];
  __syncwarp();
  if (lane == 31) result = shared[0];
  output_floats(args)[lane] = result;
}

// Atomics and plain accesses in turn. 1: without the barrier in between.
__global__ void atomics_between_barriers(const MicroArguments args) {
  float* output = output_floats(args);
  cuda::add_atomic(output, 1.0f);
  if (args.option == 0) __syncthreads();
  if (threadIdx.x == 40) output[0] = 2.0f * output[0];
  __syncthreads();
  cuda::add_atomic(output, 1.0f);
}

__global__ void misaligned(const MicroArguments args) {
  const auto* bytes = static_cast<const char*>(args.a) + args.option * 8;
  output_floats(args)[threadIdx.x] = reinterpret_cast<const float4*>(bytes)->x;
}

__global__ void crash(const MicroArguments args) {
  const auto* pointer = reinterpret_cast<const volatile float*>(args.option);
  output_floats(args)[threadIdx.x] = args.option == 0 ? 0.0f : *pointer;
}

const NamedKernel kFaultKernels[] = {{"read_without_barrier", read_without_barrier},
                                     {"overwrite_without_barrier", overwrite_without_barrier},
                                     {"read_without_sync_warp", read_without_sync_warp},
                                     {"overwrite_without_sync_warp", overwrite_without_sync_warp},
                                     {"copy_without_wait", copy_without_wait},
                                     {"copy_with_short_wait", copy_with_short_wait},
                                     {"divergent_barrier", divergent_barrier},
                                     {"divergent_product", divergent_product},
                                     {"deadlock", deadlock},
                                     {"shared_out_of_bounds", shared_out_of_bounds},
                                     {"global_out_of_bounds", global_out_of_bounds},
                                     {"uninitialized_shared", uninitialized_shared},
                                     {"uninitialized_workspace", uninitialized_workspace},
                                     {"write_to_input", write_to_input},
                                     {"race_between_blocks", race_between_blocks},
                                     {"lost_addition", lost_addition},
                                     {"partial_barriers", partial_barriers},
                                     {"atomics_between_barriers", atomics_between_barriers},
                                     {"misaligned", misaligned},
                                     {"crash", crash},
                                     {nullptr, nullptr}};

}  // namespace topgather::micro
