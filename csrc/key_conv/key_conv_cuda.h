// The CUDA entry points of the key convolution. Absent from a build without CUDA.
//
// Everything is queued on the caller's stream; nothing waits for the device. Any alignment: rows are read 16 bytes at a
// time where they allow it (backward: four elements). cu_seqlens is read on the device alone: whatever it holds,
// nothing outside the tensors is touched; a token of no sequence gets NaN in out and grad_key and adds nothing to other
// gradients. float32, bfloat16 and float16.
#pragma once

#include "../cuda/place.h"
#include "key_conv_params.h"

namespace topgather {

// Needs no workspace.
void key_conv_forward_cuda(const KeyConvForwardParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

// The same bits every time.
int64_t key_conv_backward_workspace_bytes(const KeyConvBackwardParams& params, const CudaPlace& place);
void key_conv_backward_cuda(const KeyConvBackwardParams& params, const CudaWorkspace& workspace,
                            const CudaPlace& place);

}  // namespace topgather
