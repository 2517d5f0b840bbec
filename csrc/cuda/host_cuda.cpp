#include <stdexcept>
#include <string>

#include "host.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define TOPGATHER_HAVE_NVTX
#endif

namespace topgather {

void throw_cuda_error(cudaError_t status, const char* doing) {
  throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(status));
}

#if defined(TOPGATHER_HAVE_NVTX)
StageRange::StageRange(const char* name) { nvtxRangePushA(name); }
StageRange::~StageRange() { nvtxRangePop(); }
#else
StageRange::StageRange(const char*) {}
StageRange::~StageRange() {}
#endif

}  // namespace topgather
