// The functions of cuda_runtime_api.h: one device, streams that finish at once.
#include <cstring>

#include "shadow.h"

namespace {
thread_local int current_device = 0;
}

cudaError_t cudaGetDevice(int* device) {
  if (topgather::emulation::options.driver_version < CUDART_VERSION) return cudaErrorInsufficientDriver;
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = topgather::emulation::options.driver_version;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    default: return "invalid device ordinal";
  }
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const auto most = static_cast<int>(topgather::emulation::options.shared_limit);
  const int limit = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? most : cudaSharedmemCarveoutMaxShared;
  return value <= limit ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const topgather::emulation::Options& options = topgather::emulation::options;
  ++topgather::emulation::statistics.attributes_read;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrMultiProcessorCount: *value = options.num_multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = options.compute_capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = options.compute_capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(options.shared_limit) + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(options.shared_limit); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t num_bytes, cudaStream_t) {
  topgather::emulation::note_host_write(address, num_bytes);
  std::memset(address, value, num_bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t num_bytes, cudaMemcpyKind, cudaStream_t) {
  topgather::emulation::note_host_write(target, num_bytes);
  std::memcpy(target, source, num_bytes);
  return cudaSuccess;
}
