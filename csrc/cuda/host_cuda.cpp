#include <atomic>
#include <stdexcept>
#include <string>

#include "host.h"
#include "workspace.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define TOPGATHER_HAVE_NVTX
#endif

namespace topgather {

namespace {
std::atomic<int64_t> budget_override{0};
}  // namespace

int64_t set_workspace_budget(int64_t bytes) { return budget_override.exchange(bytes); }

int64_t workspace_budget(int64_t configured) {
  const int64_t other = budget_override.load(std::memory_order_relaxed);
  return other > 0 ? other : configured;
}

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
