// One instruction set's entry points. Compiled once per target; see CMakeLists.txt for the flags of each.
#include "moba_cpu.h"

#include "../cpu/dispatch.h"
#include "moba_backward_cpu.h"
#include "moba_forward_cpu.h"
#include "moba_route_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

#if TOPGATHER_MATRIX_UNIT || TOPGATHER_PAIR_PRODUCTS

// What this target has more multiplies bfloat16. All else is the AVX-512 build's.
void centroids(const CentroidParams& params) { avx512::kMobaCpuKernels.centroids(params); }

void route(const MobaRouteParams& params) { avx512::kMobaCpuKernels.route(params); }

void forward(const MobaForwardParams& params) {
  if (params.problem.dtype != Dtype::kBFloat16) return avx512::kMobaCpuKernels.forward(params);
  forward_storage<BFloat16>(params);
}

void backward(const MobaBackwardParams& params) {
  if (params.problem.dtype != Dtype::kBFloat16) return avx512::kMobaCpuKernels.backward(params);
  backward_storage<BFloat16>(params);
}

#else

void centroids(const CentroidParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    compute_centroids<Storage>(params.problem, params.key, [&](int64_t sequence, int64_t head, int64_t block) {
      return params.centroids.at<ComputeOf<Storage> >(sequence, head, block);
    });
  });
}

void route(const MobaRouteParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { route_storage<decltype(storage)>(params); });
}

void forward(const MobaForwardParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { forward_storage<decltype(storage)>(params); });
}

void backward(const MobaBackwardParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { backward_storage<decltype(storage)>(params); });
}

#endif

}  // namespace

extern const MobaCpuKernels kMobaCpuKernels{&centroids, &route, &forward, &backward};

}  // namespace topgather::TOPGATHER_CPU_TARGET
