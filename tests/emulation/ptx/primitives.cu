// One small kernel a primitive of csrc/cuda/primitives.cuh, and one for the intrinsics that kernels use beside them.
// nvcc makes PTX of it, the interpreter runs that, and tests/cuda/test_ptx.py knows in closed form what must come out.
//
// Registers go to and from memory as they are, lane by lane: the layout of a fragment is the test's to know.
#include <cstdint>

#include "cuda/primitives.cuh"

namespace topgather::ptx {

struct Arguments {
  const void* a;
  const void* b;
  void* output;
  int64_t count;
};

template <typename T>
__device__ const T* input_a(const Arguments& args) {
  return static_cast<const T*>(args.a);
}

template <typename T>
__device__ const T* input_b(const Arguments& args) {
  return static_cast<const T*>(args.b);
}

template <typename T>
__device__ T* output(const Arguments& args) {
  return static_cast<T*>(args.output);
}

// a: 4 registers a lane, b: 2, output: 4 floats that are added to.
template <typename Element>
__global__ void __launch_bounds__(64) multiply_accumulate(const Arguments args) {
  const int thread = threadIdx.x;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = input_a<uint32_t>(args)[thread * 4 + i];
  for (int i = 0; i < 4; ++i) d[i] = output<float>(args)[thread * 4 + i];
  cuda::multiply_accumulate<Element>(d, a, input_b<uint32_t>(args)[thread * 2],
                                     input_b<uint32_t>(args)[thread * 2 + 1]);
  for (int i = 0; i < 4; ++i) output<float>(args)[thread * 4 + i] = d[i];
}

// a: 16 bytes a lane, laid into shared memory in the order that b says. output: 4 registers a lane.
template <bool kIsTransposed>
__global__ void __launch_bounds__(32) load_matrix(const Arguments args) {
  auto* rows = reinterpret_cast<uint4*>(cuda::dynamic_shared_memory());
  const int lane = threadIdx.x;
  rows[input_b<int>(args)[lane]] = input_a<uint4>(args)[lane];
  __syncwarp();
  uint32_t r[4];
  if constexpr (kIsTransposed) {
    cuda::load_matrix_x4_transposed(r, rows + input_b<int>(args)[lane]);
  } else {
    cuda::load_matrix_x4(r, rows + input_b<int>(args)[lane]);
  }
  for (int i = 0; i < 4; ++i) output<uint32_t>(args)[lane * 4 + i] = r[i];
}

// Three groups of one copy a thread. a: a Word, of 16 or 4 bytes, a thread and group; those from `count` on are not copied. output: what
// the thread's mirror image copied, read as soon as the group's wait allows.
template <typename Word>
__global__ void __launch_bounds__(64) copy_async(const Arguments args) {
  auto* stage = reinterpret_cast<Word*>(cuda::dynamic_shared_memory());
  const int thread = threadIdx.x, mirror = 63 - thread;
  for (int group = 0; group < 3; ++group) {
    const int i = group * 64 + thread;
    if constexpr (sizeof(Word) == 16) {
      cuda::copy_async_16(stage + i, input_a<Word>(args) + i, i < args.count);
    } else {
      cuda::copy_async_4(stage + i, input_a<Word>(args) + i, i < args.count);
    }
    cuda::copy_async_commit();
  }
  cuda::copy_async_wait<2>();
  __syncthreads();
  output<Word>(args)[thread] = stage[mirror];
  cuda::copy_async_wait<1>();
  __syncthreads();
  output<Word>(args)[64 + thread] = stage[64 + mirror];
  cuda::copy_async_wait<0>();
  __syncthreads();
  output<Word>(args)[128 + thread] = stage[128 + mirror];
}

// a and b: floats. output: pairs of them packed.
template <typename Element>
__global__ void __launch_bounds__(32) pack(const Arguments args) {
  for (int64_t i = threadIdx.x; i < args.count; i += 32) {
    output<uint32_t>(args)[i] = cuda::pack2<Element>(input_a<float>(args)[i], input_b<float>(args)[i]);
  }
}

// a: packed pairs. output: float pairs.
template <typename Element>
__global__ void __launch_bounds__(32) unpack(const Arguments args) {
  for (int64_t i = threadIdx.x; i < args.count; i += 32) {
    output<float2>(args)[i] = cuda::unpack2<Element>(input_a<uint32_t>(args)[i]);
  }
}

template <typename Element>
__global__ void __launch_bounds__(32) from_float(const Arguments args) {
  for (int64_t i = threadIdx.x; i < args.count; i += 32) {
    output<Element>(args)[i] = cuda::from_float<Element>(input_a<float>(args)[i]);
  }
}

template <typename Element>
__global__ void __launch_bounds__(32) to_float(const Arguments args) {
  for (int64_t i = threadIdx.x; i < args.count; i += 32) {
    output<float>(args)[i] = cuda::to_float(input_a<Element>(args)[i]);
  }
}

__global__ void __launch_bounds__(32) exp2_approximate(const Arguments args) {
  for (int64_t i = threadIdx.x; i < args.count; i += 32) {
    output<float>(args)[i] = cuda::exp2_approximate(input_a<float>(args)[i]);
  }
}

__global__ void __launch_bounds__(32) reciprocal_approximate(const Arguments args) {
  for (int64_t i = threadIdx.x; i < args.count; i += 32) {
    output<float>(args)[i] = cuda::reciprocal_approximate(input_a<float>(args)[i]);
  }
}

__global__ void __launch_bounds__(32) max_or_nan(const Arguments args) {
  for (int64_t i = threadIdx.x; i < args.count; i += 32) {
    output<float>(args)[i] = cuda::max_or_nan(input_a<float>(args)[i], input_b<float>(args)[i]);
  }
}

// Every thread adds its own numbers. output: 8 cells of each kind; which cell, b says.
__global__ void __launch_bounds__(64) add_atomic_float(const Arguments args) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  cuda::add_atomic(output<float>(args) + input_b<int>(args)[i], input_a<float>(args)[i]);
}

__global__ void __launch_bounds__(64) add_atomic_pair(const Arguments args) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  cuda::add_atomic_pair(output<float>(args) + 2 * input_b<int>(args)[i], input_a<float2>(args)[i]);
}

__global__ void __launch_bounds__(64) add_atomic_quad(const Arguments args) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  cuda::add_atomic_quad(output<float>(args) + 4 * input_b<int>(args)[i], input_a<float4>(args)[i]);
}

__global__ void __launch_bounds__(64) add_atomic_int(const Arguments args) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  cuda::add_atomic(output<int32_t>(args) + input_b<int>(args)[i], input_a<int32_t>(args)[i]);
}

__global__ void __launch_bounds__(64) max_atomic(const Arguments args) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  cuda::max_atomic(output<uint32_t>(args) + input_b<int>(args)[i], input_a<uint32_t>(args)[i]);
}

// output: where shared memory begins, modulo 1024, and what one thread wrote there for another.
__global__ void __launch_bounds__(32) shared_memory(const Arguments args) {
  unsigned char* shared = cuda::dynamic_shared_memory();
  shared[threadIdx.x] = static_cast<unsigned char>(3 * threadIdx.x);
  __syncwarp();
  output<uint32_t>(args)[2 * threadIdx.x] = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(shared) % 1024);
  output<uint32_t>(args)[2 * threadIdx.x + 1] = shared[31 - threadIdx.x];
}

// output: [10, 64] int32.
__global__ void __launch_bounds__(64) warp_intrinsics(const Arguments args) {
  const int lane = threadIdx.x % 32;
  const int value = input_a<int>(args)[threadIdx.x];
  const float number = static_cast<float>(value);
  int row = 0;
  const auto write = [&](int result) { output<int>(args)[64 * row++ + threadIdx.x] = result; };
  write(__shfl_sync(0xffffffffu, value, 5));
  write(__shfl_sync(0xffffffffu, value, value));
  write(__shfl_xor_sync(0xffffffffu, value, 8));
  write(static_cast<int>(__shfl_up_sync(0xffffffffu, number, 3)));
  write(static_cast<int>(__ballot_sync(0xffffffffu, value % 3 == 0)));
  write(__any_sync(0xffffffffu, value == 63 * 7 % 64));
  // Each half of a warp for itself.
  write(lane < 16 ? __shfl_xor_sync(0x0000ffffu, value, 1) : __shfl_xor_sync(0xffff0000u, value, 2));
  write(__popc(value) + 100 * __ffs(value) + 10000 * __clz(value));
  write(static_cast<int>(__float_as_uint(number)));
  write(__syncthreads_or(value == static_cast<int>(args.count)));
}

// Warps leave the loop at different times, threads part within it, and half of the block is gone before the barrier.
// output: [blocks, 64] int32.
__global__ void __launch_bounds__(128) divergence(const Arguments args) {
  auto* shared = reinterpret_cast<int*>(cuda::dynamic_shared_memory());
  const int thread = threadIdx.x;
  if (thread >= 64) return;
  int sum = 0;
  for (int i = 0; i <= thread + static_cast<int>(blockIdx.x); ++i) {
    if (i % 3 == thread % 3) {
      sum += i;
    } else if (i % 7 == 5) {
      sum -= thread;
    }
  }
  shared[thread] = sum;
  __syncthreads();
  output<int>(args)[blockIdx.x * 64 + thread] = shared[63 - thread];
}

template __global__ void multiply_accumulate<BFloat16>(Arguments);
template __global__ void multiply_accumulate<Float16>(Arguments);
template __global__ void load_matrix<false>(Arguments);
template __global__ void load_matrix<true>(Arguments);
template __global__ void copy_async<float>(Arguments);
template __global__ void copy_async<uint4>(Arguments);
template __global__ void pack<BFloat16>(Arguments);
template __global__ void pack<Float16>(Arguments);
template __global__ void unpack<BFloat16>(Arguments);
template __global__ void unpack<Float16>(Arguments);
template __global__ void from_float<float>(Arguments);
template __global__ void from_float<BFloat16>(Arguments);
template __global__ void from_float<Float16>(Arguments);
template __global__ void to_float<float>(Arguments);
template __global__ void to_float<BFloat16>(Arguments);
template __global__ void to_float<Float16>(Arguments);

}  // namespace topgather::ptx
