// The CUDA entry points of the indexer. Absent from a build without CUDA.
//
// Everything is queued on the caller's stream; nothing waits for the device. float32, bfloat16 and float16; an index
// head of at most 256 columns.
#pragma once

#include "../cuda/place.h"
#include "indexer_params.h"

namespace topgather {

int64_t index_route_workspace_bytes(const IndexRouteParams& params, const CudaPlace& place);
void index_route_cuda(const IndexRouteParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

}  // namespace topgather
