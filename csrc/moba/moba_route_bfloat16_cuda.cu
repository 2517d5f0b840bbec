// The router's kernels for bfloat16.
#include "moba_route_cuda.cuh"

namespace topgather {

const RouteKernel kRouteBFloat16[3] = {route_kernel<BFloat16, 64>(Dtype::kBFloat16),
                                       route_kernel<BFloat16, 128>(Dtype::kBFloat16),
                                       route_kernel<BFloat16, 256>(Dtype::kBFloat16)};

}  // namespace topgather
