#include "device.h"

#include <cuda_runtime_api.h>

namespace topgather {

std::string cuda_architectures() { return TOPGATHER_CUDA_ARCHITECTURES; }

std::string cuda_toolkit() { return cuda_version_text(CUDART_VERSION); }

std::vector<std::string> cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is an answer, not an error to leave behind for the next call
    return {};
  }
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    names.push_back(std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
                    std::to_string(properties.minor));
  }
  return names;
}

}  // namespace topgather
