// The best pairs of product keys on CUDA: the choice of a kernel and its launch. memory_topk_cuda.cuh has the kernel.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../cuda/limits.h"
#include "memory_topk_cuda.cuh"

namespace topgather {

namespace {

// Of one dtype, the shortest lists first.
constexpr ProductKeyKernel kKernels[] = {product_key_kernel<BFloat16, 1>(), product_key_kernel<BFloat16, 4>(),
                                         product_key_kernel<Float16, 1>(),  product_key_kernel<Float16, 4>(),
                                         product_key_kernel<float, 1>(),    product_key_kernel<float, 4>()};

const ProductKeyKernel& kernel_for(const ProductKeyParams& params) {
  if (params.half_dim <= kProductKeyMaxHalfDim) {
    for (const ProductKeyKernel& kernel : kKernels) {
      if (params.dtype == kernel.dtype && params.top_k <= kernel.max_top_k) return kernel;
    }
  }
  throw std::invalid_argument("product_key_topk on CUDA takes float32, bfloat16 and float16, head_dim up to " +
                              std::to_string(2 * kProductKeyMaxHalfDim) + " and top_k up to " +
                              std::to_string(kProductKeyMaxTopK) + ", got dtype code " +
                              std::to_string(static_cast<int>(params.dtype)) + ", head_dim " +
                              std::to_string(2 * params.half_dim) + " and top_k " + std::to_string(params.top_k));
}

// Pairs of ranks that can be among the top_k, by (a + 1) (b + 1): as many sums, at least, are as large as theirs.
void list_pairs(ProductKeyArguments& args) {
  const int last = std::min(args.top_k, args.num_keys) - 1;
  int32_t ends[kProductKeyMaxTopK + 1] = {};
  const auto for_each_pair = [&](const auto& visit) {
    for (int a = 0; a <= last; ++a) {
      for (int b = 0; b <= last && (a + 1) * (b + 1) <= args.top_k; ++b) visit(a, b, (a + 1) * (b + 1));
    }
  };
  for_each_pair([&](int, int, int product) { ++ends[product]; });
  for (int product = 1; product <= args.top_k; ++product) ends[product] += ends[product - 1];
  args.num_pairs = ends[args.top_k];
  for_each_pair([&](int a, int b, int product) { args.pairs[--ends[product]] = static_cast<uint16_t>(a + 256 * b); });
}

}  // namespace

void product_key_topk_cuda(const ProductKeyParams& params, const CudaWorkspace&, const CudaPlace& place) {
  const ProductKeyKernel& kernel = kernel_for(params);
  if (params.num_tokens == 0 || params.num_heads == 0) return;
  const DeviceGuard guard(place.device);
  const StageRange range("memory.product_keys");
  const int64_t num_tiles = (params.num_tokens + kernel.rows - 1) / kernel.rows;
  require(num_tiles <= INT32_MAX / params.num_heads, "product_key_topk: more than 2^31 - 1 tiles of tokens");
  constexpr int64_t kOfTwo = ProductKeyCudaConfig::kSharedBytesOfTwo;
  const bool is_room_for_two = static_cast<int64_t>(cuda::max_shared_bytes()) >= 2 * kOfTwo;
  const int64_t num_stages =
      kernel.stages(params.half_dim, is_room_for_two ? kOfTwo : ProductKeyCudaConfig::kSharedBytes);
  ProductKeyArguments args{};
  args.num_tiles = static_cast<uint32_t>(num_tiles);
  args.num_tokens = params.num_tokens;
  args.num_heads = static_cast<int32_t>(params.num_heads);
  args.num_keys = static_cast<int32_t>(params.num_keys);
  args.half_dim = static_cast<int32_t>(params.half_dim);
  args.top_k = static_cast<int32_t>(params.top_k);
  args.num_stages = static_cast<int32_t>(num_stages);
  args.query = params.query;
  args.keys = params.keys;
  args.scores = params.scores.at<float>();
  args.indices = params.indices.data;
  list_pairs(args);
  kernel.launch(args, num_tiles * params.num_heads, kernel.shared_bytes(params.half_dim, num_stages),
                static_cast<cudaStream_t>(place.stream));
  rewrite_infinite_rows(args, params.dtype, static_cast<cudaStream_t>(place.stream));
}

void add_product_key_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const ProductKeyKernel& kernel : kKernels) {
    const char* name = kernel.max_top_k <= 32 ? "product_key_topk, top_k <= 32" : "product_key_topk, top_k <= 128";
    const int64_t num_stages = kernel.stages(kProductKeyMaxHalfDim, ProductKeyCudaConfig::kSharedBytesOfTwo);
    facts.push_back({name, kernel.dtype, 2 * kProductKeyMaxHalfDim, kernel.threads,
                     kernel.shared_bytes(kProductKeyMaxHalfDim, num_stages)});
  }
  add_infinite_rows_kernel_facts(facts);
}

}  // namespace topgather
