// The forward's kernels for bfloat16.
#include "moba_forward_cuda.cuh"

namespace topgather {

const ForwardKernel kForwardBFloat16[3] = {forward_kernel<BFloat16, 64>(Dtype::kBFloat16),
                                           forward_kernel<BFloat16, 128>(Dtype::kBFloat16),
                                           forward_kernel<BFloat16, 256>(Dtype::kBFloat16)};

}  // namespace topgather
