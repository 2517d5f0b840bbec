// The forward's kernels for float16.
#include "moba_forward_cuda.cuh"

namespace topgather {

const ForwardKernel kForwardFloat16[3] = {forward_kernel<Float16, 64>(Dtype::kFloat16),
                                          forward_kernel<Float16, 128>(Dtype::kFloat16),
                                          forward_kernel<Float16, 256>(Dtype::kFloat16)};

}  // namespace topgather
