// The backward's kernels for float32.
#include "moba_backward_cuda.cuh"

namespace topgather {

const BackwardKernel kBackwardFloat32[3] = {backward_kernel<float, 64>(Dtype::kFloat32),
                                            backward_kernel<float, 128>(Dtype::kFloat32),
                                            backward_kernel<float, 256>(Dtype::kFloat32)};

}  // namespace topgather
