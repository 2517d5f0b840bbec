// Stands in for device.cpp in a build without CUDA.
#include "device.h"

namespace topgather {

std::string cuda_architectures() { return ""; }
std::string cuda_toolkit() { return ""; }
std::vector<std::string> cuda_devices() { return {}; }

}  // namespace topgather
