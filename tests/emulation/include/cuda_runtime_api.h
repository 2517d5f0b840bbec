// The part of the CUDA runtime's interface that topgather uses, for a host compiler: no CUDA toolkit is needed to build
// the emulation. The functions are defined in runtime/runtime_api.cpp; streams are ignored, everything happens at once.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

// --- qualifiers -----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Static shared memory is refused: only cuda::dynamic_shared_memory() is poisoned, bounded and watched for races.
#define __shared__ static_assert(false, "use cuda::dynamic_shared_memory()");

// --- vector types ---------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned int x, y, z;
};
struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 sizes) : x(sizes.x), y(sizes.y), z(sizes.z) {}
};

#define TOPGATHER_VECTOR_TYPES(Name, Scalar)                              \
  struct alignas(2 * sizeof(Scalar)) Name##2 { Scalar x, y; };            \
  struct alignas(16) Name##4 { Scalar x, y, z, w; };                      \
  constexpr Name##2 make_##Name##2(Scalar x, Scalar y) { return {x, y}; } \
  constexpr Name##4 make_##Name##4(Scalar x, Scalar y, Scalar z, Scalar w) { return {x, y, z, w}; }
TOPGATHER_VECTOR_TYPES(float, float)
TOPGATHER_VECTOR_TYPES(int, int)
TOPGATHER_VECTOR_TYPES(uint, unsigned int)
#undef TOPGATHER_VECTOR_TYPES

// --- host functions -------------------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
#define CUDART_VERSION 13000
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* address, int value, size_t num_bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t num_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);

#include "device_builtins.h"
