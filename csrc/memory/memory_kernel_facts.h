// Each kernel file's part of memory_cuda_kernel_facts.
#pragma once

#include <vector>

#include "../cuda/place.h"

namespace topgather {

void add_product_key_kernel_facts(std::vector<CudaKernelFacts>& facts);
void add_memory_backward_kernel_facts(std::vector<CudaKernelFacts>& facts);

}  // namespace topgather
