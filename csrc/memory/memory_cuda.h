// The CUDA entry points of memory layers. Absent from a build without CUDA.
//
// Everything is queued on the caller's stream; nothing waits for the device. An index outside [0, num_rows) is never
// followed: it makes its token's out, or its own dot product, NaN.
#pragma once

#include <vector>

#include "../cuda/place.h"
#include "memory_params.h"

namespace topgather {

std::vector<CudaKernelFacts> memory_cuda_kernel_facts();
void add_product_key_kernel_facts(std::vector<CudaKernelFacts>& facts);  // its part of them

// Of the sizes that kernels take; others raise std::invalid_argument. float32, bfloat16 and float16.
constexpr int64_t kProductKeyMaxHalfDim = 256;
constexpr int64_t kProductKeyMaxTopK = 128;

// top_k <= num_keys is not needed, top_k <= num_keys^2 is. No workspace.
void product_key_topk_cuda(const ProductKeyParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

// Any alignment; 16-byte loads where rows allow them. No workspace.
void memory_lookup_cuda(const MemoryLookupParams& params, const CudaWorkspace& workspace, const CudaPlace& place);
void memory_dot_cuda(const MemoryDotParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

// Rows of 8 bits; 16-byte loads where rows and groups allow them. No workspace.
void memory_lookup_quantized_cuda(const QuantizedLookupParams& params, const CudaWorkspace& workspace,
                                  const CudaPlace& place);
void memory_dot_quantized_cuda(const QuantizedDotParams& params, const CudaWorkspace& workspace,
                               const CudaPlace& place);

// The same bits every time.
int64_t memory_backward_workspace_bytes(const MemoryBackwardParams& params, const CudaPlace& place);
void memory_backward_cuda(const MemoryBackwardParams& params, const CudaWorkspace& workspace, const CudaPlace& place);
int64_t memory_update_workspace_bytes(const MemoryUpdateParams& params, const CudaPlace& place);
void memory_update_cuda(const MemoryUpdateParams& params, const CudaWorkspace& workspace, const CudaPlace& place);

}  // namespace topgather
