// The forward's kernels for float32.
#include "moba_forward_cuda.cuh"

namespace topgather {

const ForwardKernel kForwardFloat32[3] = {forward_kernel<float, 64>(Dtype::kFloat32),
                                          forward_kernel<float, 128>(Dtype::kFloat32),
                                          forward_kernel<float, 256>(Dtype::kFloat32)};

}  // namespace topgather
