// One instruction set's entry points. Compiled once per target; see CMakeLists.txt for the flags of each.
#include "moba_cpu.h"

#include "moba_backward_cpu.h"
#include "moba_forward_cpu.h"
#include "moba_route_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

// Calls visit with a value of the storage type that `dtype` stands for.
template <typename Visit>
void with_storage(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kFloat32: return visit(float{});
    case Dtype::kFloat64: return visit(double{});
    case Dtype::kBFloat16: return visit(BFloat16{});
    case Dtype::kFloat16: return visit(Float16{});
  }
}

void centroids(const CentroidParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    compute_centroids<Storage>(params.problem, params.key, [&](int64_t sequence, int64_t head, int64_t block) {
      return rows_of<ComputeOf<Storage>>(params.centroids, sequence, head, block);
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

}  // namespace

extern const MobaCpuKernels kMobaCpuKernels{&centroids, &route, &forward, &backward};

}  // namespace topgather::TOPGATHER_CPU_TARGET
