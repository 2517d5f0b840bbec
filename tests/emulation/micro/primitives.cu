// One kernel a primitive. Fragments are filled by hand from the tables of the PTX ISA, so that no primitive is tested
// through another.
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/primitives.cuh"
#include "micro_kernels.h"

namespace topgather::micro {

// --- matrix unit: a [16, 16] and b [16, 8] in rows, output [16, 8] float32 = 1 + a b --------------------------------

template <typename Element>
__global__ void __launch_bounds__(32) multiply_accumulate(const MicroArguments args) {
  const auto* a = static_cast<const Element*>(args.a);
  const auto* b = static_cast<const Element*>(args.b);
  const int row = static_cast<int>(threadIdx.x) / 4, column = static_cast<int>(threadIdx.x) % 4 * 2;
  const auto pair = [](Element low, Element high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
  uint32_t a_fragment[4], b_fragment[2];
  for (int i = 0; i < 4; ++i) {
    const Element* first = a + (row + i % 2 * 8) * 16 + column + i / 2 * 8;
    a_fragment[i] = pair(first[0], first[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const Element* first = b + (column + i * 8) * 8 + row;
    b_fragment[i] = pair(first[0], first[8]);
  }
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  cuda::multiply_accumulate<Element>(d, a_fragment, b_fragment[0], b_fragment[1]);
  float* output = static_cast<float*>(args.output);
  for (int i = 0; i < 4; ++i) output[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
}

// a [32 rows, 8] 16-bit, output [32 lanes, 4] 32-bit; option: transposed
__global__ void __launch_bounds__(32) load_matrix(const MicroArguments args) {
  unsigned char* row = cuda::dynamic_shared_memory() + threadIdx.x * 16;
  *reinterpret_cast<uint4*>(row) = static_cast<const uint4*>(args.a)[threadIdx.x];
  __syncwarp();
  uint32_t fragment[4];
  if (args.option != 0) {
    cuda::load_matrix_x4_transposed(fragment, row);
  } else {
    cuda::load_matrix_x4(fragment, row);
  }
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(args.output)[threadIdx.x * 4 + i] = fragment[i];
}

// --- asynchronous copies: thread t copies a[t] unless t >= option; three groups in flight ---------------------------

__global__ void __launch_bounds__(64) copy_async(const MicroArguments args) {
  auto* stage = reinterpret_cast<uint4*>(cuda::dynamic_shared_memory());
  const auto* source = static_cast<const uint4*>(args.a);
  const unsigned thread = threadIdx.x;
  const unsigned threads = blockDim.x;
  for (unsigned group = 0; group < 3; ++group) {
    const unsigned index = group * threads + thread;
    const bool is_copied = index < args.option;
    cuda::copy_async_16(stage + index, is_copied ? source + index : nullptr, is_copied);
    cuda::copy_async_commit();
  }
  auto* output = static_cast<uint4*>(args.output);
  const unsigned other = threads - 1 - thread;
  cuda::copy_async_wait<2>();
  __syncthreads();
  output[thread] = stage[other];
  cuda::copy_async_wait<1>();
  __syncthreads();
  output[threads + thread] = stage[threads + other];
  cuda::copy_async_wait<0>();
  __syncthreads();
  output[2 * threads + thread] = stage[2 * threads + other];
}

// --- conversions: a [n] float32 pairs, output [n / 2] packed, then [n] unpacked, then [n] through the scalar functions

template <typename Element>
__global__ void __launch_bounds__(32) convert(const MicroArguments args) {
  const auto* input = static_cast<const float*>(args.a);
  auto* packed = static_cast<uint32_t*>(args.output);
  auto* unpacked = reinterpret_cast<float*>(packed + args.option / 2);
  float* scalar = unpacked + args.option;
  for (unsigned i = threadIdx.x; i < args.option / 2; i += blockDim.x) {
    const uint32_t pair = cuda::pack2<Element>(input[2 * i], input[2 * i + 1]);
    const float2 back = cuda::unpack2<Element>(pair);
    packed[i] = pair;
    unpacked[2 * i] = back.x;
    unpacked[2 * i + 1] = back.y;
    for (unsigned j = 2 * i; j < 2 * i + 2; ++j) {
      scalar[j] = cuda::to_float(cuda::from_float<Element>(cuda::to_float(cuda::from_float<float>(input[j]))));
    }
  }
}

// --- arithmetic: output [3, n]: exp2 of a, larger one of a and b, reciprocal of a ------------------------------------

__global__ void __launch_bounds__(32) arithmetic(const MicroArguments args) {
  const auto* a = static_cast<const float*>(args.a);
  const auto* b = static_cast<const float*>(args.b);
  auto* output = static_cast<float*>(args.output);
  for (unsigned i = threadIdx.x; i < args.option; i += blockDim.x) {
    output[i] = cuda::exp2_approximate(a[i]);
    output[args.option + i] = cuda::max_or_nan(a[i], b[i]);
    output[2 * args.option + i] = cuda::reciprocal_approximate(a[i]);
  }
}

// --- warps: output [10, 32] -----------------------------------------------------------------------------------------

__global__ void __launch_bounds__(32) warp_intrinsics(const MicroArguments args) {
  constexpr unsigned kAll = 0xffffffffu;
  auto* output = static_cast<int32_t*>(args.output);
  const int lane = static_cast<int>(threadIdx.x);
  const int value = lane * lane;
  const auto write = [&](int row, int result) { output[row * 32 + lane] = result; };
  write(0, __shfl_sync(kAll, value, 5));
  write(1, __shfl_sync(kAll, value, lane + 1, 8));
  write(2, __shfl_xor_sync(kAll, value, 3));
  write(3, static_cast<int>(__shfl_up_sync(kAll, static_cast<unsigned>(value), 2)));
  write(4, static_cast<int>(__shfl_down_sync(kAll, static_cast<float>(value), 3, 16)));
  write(5, static_cast<int>(__ballot_sync(kAll, lane % 3 == 0)));
  write(6, __any_sync(kAll, lane == 31));
  write(7, __any_sync(kAll, lane == 32));
  // Halves of a warp on their own.
  write(8, lane < 16 ? __shfl_xor_sync(0x0000ffffu, value, 1) : __shfl_xor_sync(0xffff0000u, value, 2));
  write(9, __popc(0xf0f0u) + 100 * __ffs(8) + 10000 * __clz(1 << 20) + 1000000 * (min(3, 4) + max(1, 2)));
}

// --- barriers: output [blocks, threads]: rounds counted through shared memory ---------------------------------------

__global__ void __launch_bounds__(256) barriers(const MicroArguments args) {
  auto* numbers = reinterpret_cast<int*>(cuda::dynamic_shared_memory());
  const unsigned thread = threadIdx.x;
  int sum = 0;
  int rounds = 0;
  bool goes_on = true;
  while (goes_on) {
    numbers[thread] = static_cast<int>(thread) + rounds;
    __syncthreads();  // publishes this round's numbers
    sum += numbers[(thread + 1) % blockDim.x];
    ++rounds;
    // Also lets the numbers be overwritten. One thread asks for more.
    goes_on = __syncthreads_or(thread == 77 && rounds < args.option) != 0;
  }
  static_cast<int*>(args.output)[blockIdx.x * blockDim.x + thread] = sum;
}

// Threads from 64 on leave before the barrier.
__global__ void __launch_bounds__(128) exit_before_barrier(const MicroArguments args) {
  if (threadIdx.x >= 64) return;
  __syncthreads();
  static_cast<int*>(args.output)[threadIdx.x] = 1;
}

// --- atomics: output 16 floats, 16 ints, 16 unsigned; added to by every thread of every block -----------------------

__global__ void __launch_bounds__(128) atomics(const MicroArguments args) {
  auto* floats = static_cast<float*>(args.output);
  auto* integers = reinterpret_cast<int32_t*>(floats + 16);
  auto* maxima = reinterpret_cast<uint32_t*>(integers + 16);
  cuda::add_atomic(floats, 1.0f);
  cuda::add_atomic_pair(floats + 2, make_float2(1.0f, 2.0f));
  cuda::add_atomic_quad(floats + 4, make_float4(1.0f, 2.0f, 3.0f, 4.0f));
  cuda::add_atomic_pair(floats + 8, make_float2(0x1p-127f, 0x1p-126f));  // subnormal, and not
  cuda::add_atomic(integers + threadIdx.x % 16, -2);
  cuda::max_atomic(maxima, blockIdx.x * blockDim.x + threadIdx.x);
}

// output [gridDim, 3, blockDim, 3] int32: the indices themselves
__global__ void indices(const MicroArguments args) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  auto* output = static_cast<unsigned*>(args.output) + (block * threads + thread) * 6;
  output[0] = blockIdx.x, output[1] = blockIdx.y, output[2] = blockIdx.z;
  output[3] = threadIdx.x, output[4] = threadIdx.y, output[5] = threadIdx.z;
}

// --- speed: option operations a warp, results kept alive ------------------------------------------------------------

__global__ void __launch_bounds__(128) many_products(const MicroArguments args) {
  float d[4] = {};
  const uint32_t a[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};  // ones
  for (int i = 0; i < args.option; ++i) cuda::multiply_accumulate<BFloat16>(d, a, a[i % 4], a[0]);
  static_cast<float*>(args.output)[threadIdx.x] = d[0] + d[3];
}

__global__ void __launch_bounds__(128) many_shuffles(const MicroArguments args) {
  int value = static_cast<int>(threadIdx.x);
  for (int i = 0; i < args.option; ++i) value += __shfl_xor_sync(0xffffffffu, value, 1);
  static_cast<int*>(args.output)[threadIdx.x] = value;
}

__global__ void __launch_bounds__(128) many_barriers(const MicroArguments args) {
  for (int i = 0; i < args.option; ++i) __syncthreads();
  static_cast<int*>(args.output)[threadIdx.x] = 0;
}

__global__ void __launch_bounds__(128) many_shared_accesses(const MicroArguments args) {
  auto* shared = reinterpret_cast<float*>(cuda::dynamic_shared_memory());
  for (int i = 0; i < 8; ++i) shared[i * 128 + threadIdx.x] = 1.0f;
  for (int i = 0; i < args.option; ++i) shared[i % 8 * 128 + threadIdx.x] += 1.0f;
  static_cast<float*>(args.output)[threadIdx.x] = shared[threadIdx.x];
}

__global__ void __launch_bounds__(128) many_matrix_loads(const MicroArguments args) {
  auto* rows = reinterpret_cast<uint4*>(cuda::dynamic_shared_memory());
  for (int i = 0; i < 4; ++i) rows[i * 128 + threadIdx.x] = uint4{};
  __syncthreads();
  uint32_t sum = 0;
  for (int i = 0; i < args.option; ++i) {
    uint32_t fragment[4];
    cuda::load_matrix_x4(fragment, rows + i % 16 * 32 + threadIdx.x % 32);
    sum += fragment[0] + fragment[3];
  }
  static_cast<uint32_t*>(args.output)[threadIdx.x] = sum;
}

__global__ void __launch_bounds__(128) many_global_reads(const MicroArguments args) {
  const auto* input = static_cast<const uint4*>(args.a);
  unsigned sum = 0;
  for (int i = 0; i < args.option; ++i) {
    const uint4 four = input[(i + threadIdx.x) % 256];
    sum += four.x ^ four.y ^ four.z ^ four.w;
  }
  static_cast<unsigned*>(args.output)[threadIdx.x] = sum;
}

const NamedKernel kPrimitiveKernels[] = {{"multiply_accumulate_bfloat16", multiply_accumulate<BFloat16>},
                                         {"multiply_accumulate_float16", multiply_accumulate<Float16>},
                                         {"load_matrix", load_matrix},
                                         {"copy_async", copy_async},
                                         {"convert_bfloat16", convert<BFloat16>},
                                         {"convert_float16", convert<Float16>},
                                         {"arithmetic", arithmetic},
                                         {"warp_intrinsics", warp_intrinsics},
                                         {"barriers", barriers},
                                         {"exit_before_barrier", exit_before_barrier},
                                         {"atomics", atomics},
                                         {"indices", indices},
                                         {"many_products", many_products},
                                         {"many_shuffles", many_shuffles},
                                         {"many_barriers", many_barriers},
                                         {"many_shared_accesses", many_shared_accesses},
                                         {"many_matrix_loads", many_matrix_loads},
                                         {"many_global_reads", many_global_reads},
                                         {nullptr, nullptr}};

}  // namespace topgather::micro
