// What the host needs to know of CUDA, without its headers: the same interface with and without CUDA compiled in.
#pragma once

#include <string>
#include <vector>

namespace topgather {

// A version as CUDA counts it, 1000 * major + 10 * minor, such as "13.0".
inline std::string cuda_version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
// Architectures this build holds code for, as nvcc names them; empty without CUDA.
std::string cuda_architectures();
// Version of the toolkit it was built with, such as "13.0"; empty without CUDA.
std::string cuda_toolkit();
// One line per device seen; empty where there is no driver, no device or no CUDA in this build.
std::vector<std::string> cuda_devices();

}  // namespace topgather
