// The CUDA kernels of block attention. Absent from a build without CUDA.
#pragma once

#include "moba_params.h"

namespace topgather {

struct CudaPlace {
  int device;
  void* stream;  // cudaStream_t of the caller
};

// Dense problems only; float32, bfloat16 and float16 keys, float32 centroids. Queued on the stream, no host wait.
void moba_centroids_cuda(const CentroidParams& params, const CudaPlace& place);

}  // namespace topgather
