// The router's kernels for float16.
#include "moba_route_cuda.cuh"

namespace topgather {

const RouteKernel kRouteFloat16[3] = {route_kernel<Float16, 64>(Dtype::kFloat16),
                                      route_kernel<Float16, 128>(Dtype::kFloat16),
                                      route_kernel<Float16, 256>(Dtype::kFloat16)};

}  // namespace topgather
