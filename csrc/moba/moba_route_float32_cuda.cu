// The router's kernels for float32.
#include "moba_route_cuda.cuh"

namespace topgather {

const RouteKernel kRouteFloat32[3] = {route_kernel<float, 64>(Dtype::kFloat32),
                                      route_kernel<float, 128>(Dtype::kFloat32),
                                      route_kernel<float, 256>(Dtype::kFloat32)};

}  // namespace topgather
