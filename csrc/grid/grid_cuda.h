// The CUDA entry points of grid and window attention. Absent from a build without CUDA.
//
// Everything is queued on the caller's stream; nothing waits for the device. Rows of query, key, value, out and
// grad_out start on 16-byte boundaries and hold whole multiples of 16 bytes, the part past head_dim being zeros.
#pragma once

#include <vector>

#include "../cuda/place.h"
#include "grid_params.h"

namespace topgather {

std::vector<CudaKernelFacts> grid_cuda_kernel_facts();

// Largest head_dim that kernels take; float32, bfloat16 and float16.
constexpr int64_t kGridMaxHeadDim = 128;

// Needs no workspace.
void grid_forward_cuda(const GridForwardParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

// The same bits every time.
int64_t grid_backward_workspace_bytes(const GridBackwardParams& params, const CudaPlace& place);
void grid_backward_cuda(const GridBackwardParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

}  // namespace topgather
