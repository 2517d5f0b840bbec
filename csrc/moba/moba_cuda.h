// The CUDA entry points of block attention. Absent from a build without CUDA.
//
// Everything is queued on the caller's stream; nothing waits for the device. Rows of query, key, value and grad_out
// must start on 16-byte boundaries and hold whole multiples of 16 bytes, the part past head_dim or value_dim being
// zeros; block_centroids takes any.
#pragma once

#include <vector>

#include "../cuda/place.h"
#include "moba_params.h"

namespace topgather {

// With the router's shared memory at lists for top_k = 8.
std::vector<CudaKernelFacts> moba_cuda_kernel_facts();

// Needs no workspace.
int64_t moba_centroids_workspace_bytes(const CentroidParams& params, const CudaPlace& place);
void moba_centroids_cuda(const CentroidParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

int64_t moba_route_workspace_bytes(const MobaRouteParams& params, const CudaPlace& place);
void moba_route_cuda(const MobaRouteParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

// A row of block_indices that names a block its sequence does not have, or one block twice, gives NaN in out and lse.
int64_t moba_forward_workspace_bytes(const MobaForwardParams& params, const CudaPlace& place);
void moba_forward_cuda(const MobaForwardParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

// is_deterministic: the same bits every time, at the cost of more memory traffic; otherwise gradients are summed by
// atomic additions in whatever order they come.
int64_t moba_backward_workspace_bytes(const MobaBackwardParams& params, const CudaPlace& place);
void moba_backward_cuda(const MobaBackwardParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

// Bounds the workspace of each op in bytes, as far as it can be: 0 restores the configured bounds. Returns the bound
// before. A call and its workspace must be made under the same bound.
int64_t moba_cuda_set_budget(int64_t bytes);

}  // namespace topgather
