// What the host needs to know of CUDA, without its headers: the same interface with and without CUDA compiled in.
#pragma once

#include <string>
#include <vector>

namespace topgather {

// Architectures this build holds code for, as nvcc names them; empty without CUDA.
std::string cuda_architectures();
// Version of the toolkit it was built with, such as "13.0"; empty without CUDA.
std::string cuda_toolkit();
// One line per device seen; empty where there is no driver, no device or no CUDA in this build.
std::vector<std::string> cuda_devices();

}  // namespace topgather
