#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.h"
#include "host.h"
#include "workspace.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define TOPGATHER_HAVE_NVTX
#endif

namespace topgather {

namespace {
std::atomic<int64_t> budget_override{0};

// What the runtime's own words leave out: the runtime is part of this build, the driver of the machine.
std::string advice_on(cudaError_t status) {
  if (status != cudaErrorInsufficientDriver && status != cudaErrorUnsupportedPtxVersion) return "";
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "; no CUDA driver was found";
  return "; this build of topgather has the CUDA runtime " + cuda_version_text(CUDART_VERSION) +
         ", the driver supports CUDA up to " + cuda_version_text(driver) +
         ": update the driver, or build topgather with an older toolkit (docs/building.md)";
}
}  // namespace

int64_t set_workspace_budget(int64_t bytes) { return budget_override.exchange(bytes); }

int64_t workspace_budget(int64_t configured) {
  const int64_t other = budget_override.load(std::memory_order_relaxed);
  return other > 0 ? other : configured;
}

void throw_cuda_error(cudaError_t status, const char* doing) {
  throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(status) +
                           advice_on(status));
}

void allow_shared_memory(const void* kernel, size_t bytes) {
  constexpr const char* kDoing = "opting in to more than 48 KB of shared memory";
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0, most = 0;
  cuda_require(cudaGetDevice(&device), kDoing);
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& limit = allowed[{kernel, device}];
  if (bytes <= limit) return;
  cuda_require(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kDoing);
  if (bytes > static_cast<size_t>(most)) {
    throw std::runtime_error(std::string(kDoing) + ": a thread block needs " + std::to_string(bytes) +
                             " bytes, the device has " + std::to_string(most));
  }
  cuda_require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), kDoing);
  cuda_require(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      kDoing);
  limit = static_cast<size_t>(most);
}

#if defined(TOPGATHER_HAVE_NVTX)
namespace {
// Read once: a range that began ends.
const bool are_stages_named = [] {
  const char* wanted = std::getenv("TOPGATHER_NVTX");
  return wanted != nullptr && std::strcmp(wanted, "1") == 0;
}();
}  // namespace
StageRange::StageRange(const char* name) {
  if (are_stages_named) nvtxRangePushA(name);
}
StageRange::~StageRange() {
  if (are_stages_named) nvtxRangePop();
}
#else
StageRange::StageRange(const char*) {}
StageRange::~StageRange() {}
#endif

}  // namespace topgather
