// The CUDA entry points of decoding with a cache. Absent from a build without CUDA.
//
// Everything is queued on the caller's stream; nothing waits for the device, and how much workspace is needed follows
// from shapes alone. Lengths, page tables and choices are read by kernels. They are always checked: a token
// without a place is not stored, a query whose sequence, pages or choices cannot be gets NaN, and nothing outside the
// tensors is touched. Rows may start anywhere; where all of a call start on 16-byte boundaries they are read so.
#pragma once

#include "../cuda/place.h"
#include "decode_params.h"

namespace topgather {

// Two sequences must not share a page that both append to.
// Needs no workspace.
void moba_cache_append_cuda(const CacheAppendParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

int64_t moba_decode_route_workspace_bytes(const DecodeRouteParams& params, const CudaPlace& place);
void moba_decode_route_cuda(const DecodeRouteParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

// The same bits every time, and for a query whatever the others are.
int64_t moba_decode_workspace_bytes(const DecodeParams& params, const CudaPlace& place);
void moba_decode_cuda(const DecodeParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

}  // namespace topgather
