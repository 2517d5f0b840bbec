// The backward's kernels for bfloat16.
#include "moba_backward_cuda.cuh"

namespace topgather {

const BackwardKernel kBackwardBFloat16[3] = {backward_kernel<BFloat16, 64>(Dtype::kBFloat16),
                                             backward_kernel<BFloat16, 128>(Dtype::kBFloat16),
                                             backward_kernel<BFloat16, 256>(Dtype::kBFloat16)};

}  // namespace topgather
