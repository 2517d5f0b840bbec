// The backward's kernels for float16.
#include "moba_backward_cuda.cuh"

namespace topgather {

const BackwardKernel kBackwardFloat16[3] = {backward_kernel<Float16, 64>(Dtype::kFloat16),
                                            backward_kernel<Float16, 128>(Dtype::kFloat16),
                                            backward_kernel<Float16, 256>(Dtype::kFloat16)};

}  // namespace topgather
