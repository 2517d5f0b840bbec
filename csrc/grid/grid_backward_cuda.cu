// Grid and window attention backward on CUDA: launches, and the small kernels around those of grid_backward_cuda.cuh.
//
// Steps:
//   1. grid_row_terms: eight lanes take a token's row, shift = dot(grad_out, out); kernels that see a whole group do
//      that themselves;
//   2. grid_token_gradients with keys as rows;
//   3. grid_token_gradients with queries as rows;
//   or, of 16-bit types, of groups of one tile both at once: grid_group_gradients; of larger ones, head_dim up to 64,
//   grid_unit_gradients, which takes groups of up to 256 tokens in one pass, and of larger ones grid_large_gradients for
//   the queries;
//   where the gradient of a bias is wanted:
//   4. grid_bias_gradients: sums of pieces of the images and groups;
//   5. grid_sum_bias: a thread adds the pieces of one element in order.
// Memory: a float32 a token, and sums of pieces: G * G a head and piece, of kMaxBiasBytes at most; one piece alone is
// summed where it belongs.
#include <algorithm>
#include <cmath>

#include "grid_backward_groups_cuda.cuh"
#include "grid_backward_large_cuda.cuh"
#include "grid_backward_units_cuda.cuh"

namespace topgather {

namespace {
constexpr int kRowThreads = GridCudaConfig::kRowThreads;
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerBlock = kRowThreads / kLanesPerRow;
}  // namespace

struct GridRowArguments {
  uint32_t num_heads;
  uint32_t num_rows;
  uint32_t num_columns;
  uint32_t num_tokens;  // of all heads and images
  int32_t head_dim;
  ConstImage out;       // [batch, head, row, column, D] dtype
  ConstImage grad_out;  // [batch, head, row, column, D] dtype
  float* shift;         // [batch, head, row, column] float32
};

// Step 1.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads, 4) grid_row_terms(const GridRowArguments args) {
  const uint32_t token = blockIdx.x * kRowsPerBlock + threadIdx.x / kLanesPerRow;
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerRow;
  const bool is_there = token < args.num_tokens;
  const uint32_t line = token / args.num_columns, column = token - line * args.num_columns;
  const uint32_t plane = line / args.num_rows, row = line - plane * args.num_rows;
  const uint32_t batch = plane / args.num_heads, head = plane - batch * args.num_heads;
  float sum = 0.0f;
  if (is_there) {
    const Element* out = args.out.at<Element>(batch, head, row, column);
    const Element* grad_out = args.grad_out.at<Element>(batch, head, row, column);
    // Rows start on 16-byte boundaries and zeros follow them.
    for (int d = 2 * lane; d < args.head_dim; d += 2 * kLanesPerRow) {
      const float2 left = cuda::load_pair(out + d), right = cuda::load_pair(grad_out + d);
      sum = fmaf(left.x, right.x, fmaf(left.y, right.y, sum));
    }
  }
  sum = cuda::sum_over_lanes<kLanesPerRow>(sum);
  if (is_there && lane == 0) args.shift[token] = sum;
}

struct GridSumArguments {
  int64_t count;  // heads * G * G
  int32_t num_pieces;
  const float* pieces;  // [num_pieces, count] float32
  float* sums;          // [count] float32
};

// Step 5.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 4) grid_sum_bias(const GridSumArguments args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.count) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int piece = 0; piece < args.num_pieces; ++piece) sum += args.pieces[piece * args.count + i];
  args.sums[i] = sum;
}

namespace {

struct GridBackwardKernel {
  Dtype dtype;
  int64_t max_head_dim;
  const char* name;  // of the two kernels that take keys and queries as rows
  int64_t tokens;
  int64_t threads;
  int64_t shared_bytes;
  void (*launch_keys)(const GridBackwardArguments& args, const cuda::LaunchShape& shape);
  void (*launch_queries)(const GridBackwardArguments& args, const cuda::LaunchShape& shape);
  int64_t group_tokens;        // of the kernel that takes groups of one tile; 0 where there is none
  int64_t group_shared_bytes;  // of that kernel
  void (*launch_groups)(const GridBackwardArguments& args, const cuda::LaunchShape& shape);
  int64_t
      unit_tokens;  // of the kernel that takes keys as rows, and whole groups of up to so many; 0 where there is none
  int64_t unit_threads;
  int64_t unit_shared_bytes;
  void (*launch_units)(const GridBackwardArguments& args, const cuda::LaunchShape& shape);
};

// The kernel for groups of one tile, where there is one.
template <typename Element, int kHeadDim>
constexpr void add_group_kernel(GridBackwardKernel& kernel) {
  if constexpr (!std::is_same_v<Element, float>) {
    using Shared = GridGroupSharedMemory<Element, kHeadDim>;
    static_assert(sizeof(Shared) <= 99 * 1024, "one table for all architectures");
    static_assert(Shared::kThreads == GridLargeTiles<kHeadDim>::kWarps * kLanes, "one number of threads");
    kernel.group_tokens = Shared::kTokens;
    kernel.group_shared_bytes = sizeof(Shared);
    kernel.launch_groups = [](const GridBackwardArguments& args, const cuda::LaunchShape& shape) {
      cuda::launch(grid_group_gradients<Element, kHeadDim>, shape, args);
    };
  }
}

template <typename Shared, void (*kKeys)(GridBackwardArguments), void (*kQueries)(GridBackwardArguments)>
constexpr GridBackwardKernel token_kernels(Dtype dtype, int64_t max_head_dim, const char* name) {
  static_assert(sizeof(Shared) <= 99 * 1024, "one table for all architectures");
  return {
      dtype,
      max_head_dim,
      name,
      Shared::kTokens,
      Shared::kThreads,
      sizeof(Shared),
      [](const GridBackwardArguments& args, const cuda::LaunchShape& shape) { cuda::launch(kKeys, shape, args); },
      [](const GridBackwardArguments& args, const cuda::LaunchShape& shape) { cuda::launch(kQueries, shape, args); },
      0,
      0,
      nullptr,
      0,
      0,
      0,
      nullptr};
}

template <typename Element, int kHeadDim>
constexpr GridBackwardKernel backward_kernel() {
  GridBackwardKernel kernel{};
  if constexpr (std::is_same_v<Element, float> || kHeadDim > 64) {
    kernel = token_kernels<GridBackwardSharedMemory<Element, kHeadDim>, grid_token_gradients<Element, kHeadDim, true>,
                           grid_token_gradients<Element, kHeadDim, false>>(kDtypeOf<Element>, kHeadDim,
                                                                           "grid_token_gradients");
  } else {
    using Shared = GridUnitSharedMemory<Element, kHeadDim>;
    static_assert(sizeof(Shared) <= 99 * 1024, "one table for all architectures");
    kernel =
        token_kernels<GridLargeBackwardSharedMemory<Element, kHeadDim>, grid_large_gradients<Element, kHeadDim>,
                      grid_large_gradients<Element, kHeadDim>>(kDtypeOf<Element>, kHeadDim, "grid_large_gradients");
    kernel.launch_keys = nullptr;
    kernel.unit_tokens = Shared::kTokens;
    kernel.unit_threads = Shared::kThreads;
    kernel.unit_shared_bytes = sizeof(Shared);
    kernel.launch_units = [](const GridBackwardArguments& args, const cuda::LaunchShape& shape) {
      cuda::launch(grid_unit_gradients<Element, kHeadDim>, shape, args);
    };
  }
  add_group_kernel<Element, kHeadDim>(kernel);
  return kernel;
}

constexpr GridBackwardKernel kBackwardKernels[] = {backward_kernel<BFloat16, 64>(), backward_kernel<BFloat16, 128>(),
                                                   backward_kernel<Float16, 64>(),  backward_kernel<Float16, 128>(),
                                                   backward_kernel<float, 64>(),    backward_kernel<float, 128>()};

int64_t bias_tile_tokens(Dtype dtype) {
  return with_element(dtype,
                      [](auto element) -> int64_t { return GridTiles<decltype(element), kGridBiasHeadDim>::kTokens; });
}

int64_t bias_sums_of(const GridProblem& problem) {
  return problem.num_heads * problem.max_tokens() * problem.max_tokens();
}

// Pieces in which a bias' gradient is summed: whole thread blocks of slots.
int64_t num_pieces_of(const GridProblem& problem) {
  const int64_t tokens = bias_tile_tokens(problem.dtype);
  const GridGeometry geometry = grid::geometry_of(problem, tokens);
  const int64_t slots = tokens / geometry.slot_tokens;
  const int64_t tiles = int64_t{geometry.num_tiles} * geometry.num_tiles * problem.num_heads;
  const int64_t wanted = divide_up(GridCudaConfig::kBiasBlocks, tiles);
  const int64_t affordable = GridCudaConfig::kMaxBiasBytes / (bias_sums_of(problem) * 4 * slots);
  const int64_t useful = divide_up(geometry.num_images, slots);
  return std::max<int64_t>(1, std::min({wanted, affordable, useful})) * slots;
}

int64_t num_tokens_of(const GridProblem& problem) {
  return problem.batch_size * problem.num_heads * problem.rows.size * problem.columns.size;
}

int64_t shift_bytes_of(const GridProblem& problem) { return divide_up(num_tokens_of(problem) * 4, 256) * 256; }

// Step 1.
void launch_row_terms(const GridBackwardParams& params, float* shift, cudaStream_t stream) {
  const GridProblem& problem = params.problem;
  GridRowArguments args{};
  args.num_heads = static_cast<uint32_t>(problem.num_heads);
  args.num_rows = static_cast<uint32_t>(problem.rows.size);
  args.num_columns = static_cast<uint32_t>(problem.columns.size);
  args.head_dim = static_cast<int32_t>(problem.head_dim);
  args.out = params.out;
  args.grad_out = params.grad_out;
  args.shift = shift;
  const int64_t num_tokens = num_tokens_of(problem);
  require(num_tokens <= INT32_MAX, "grid_attention_backward on CUDA takes at most 2^31 - 1 tokens of all heads");
  args.num_tokens = static_cast<uint32_t>(num_tokens);
  const cuda::LaunchShape shape{dim3(static_cast<unsigned>(divide_up(num_tokens, kRowsPerBlock))), dim3(kRowThreads), 0,
                                stream};
  with_element(problem.dtype, [&](auto element) { cuda::launch(grid_row_terms<decltype(element)>, shape, args); });
}

// Steps 4 and 5.
void launch_bias_gradients(const GridBackwardParams& params, GridBackwardArguments args, float* pieces,
                           cudaStream_t stream) {
  const StageRange range("grid.bias_gradient");
  const GridProblem& problem = params.problem;
  const int64_t tokens = bias_tile_tokens(problem.dtype), num_pieces = num_pieces_of(problem);
  args.geometry = grid::geometry_of(problem, tokens);
  args.num_pieces = static_cast<uint32_t>(num_pieces);
  args.bias_sums = num_pieces == 1 ? params.grad_bias.at<float>() : pieces;
  const int64_t tiles = int64_t{args.geometry.num_tiles} * args.geometry.num_tiles;
  const int64_t blocks = num_pieces / (tokens / args.geometry.slot_tokens);
  require(tiles <= INT32_MAX && problem.num_heads <= 65535 && blocks <= 65535,
          "grid_attention_backward on CUDA: the bias is too large");
  const dim3 grid_dim(static_cast<unsigned>(tiles), static_cast<unsigned>(problem.num_heads),
                      static_cast<unsigned>(blocks));
  with_element(problem.dtype, [&](auto element) {
    using Shared = GridBackwardSharedMemory<decltype(element), kGridBiasHeadDim>;
    cuda::launch(grid_bias_gradients<decltype(element)>, {grid_dim, dim3(Shared::kThreads), sizeof(Shared), stream},
                 args);
  });
  if (num_pieces == 1) return;
  const int64_t count = bias_sums_of(problem);
  const GridSumArguments sums{count, static_cast<int32_t>(num_pieces), pieces, params.grad_bias.at<float>()};
  cuda::launch(grid_sum_bias<kRowThreads>,
               {dim3(static_cast<unsigned>(divide_up(count, kRowThreads))), dim3(kRowThreads), 0, stream}, sums);
}

}  // namespace

int64_t grid_backward_workspace_bytes(const GridBackwardParams& params, const CudaPlace&) {
  const GridProblem& problem = params.problem;
  grid::kernel_for(kBackwardKernels, problem);
  if (grid::is_empty(problem)) return 0;
  const int64_t num_pieces = params.grad_bias.data != nullptr ? num_pieces_of(problem) : 0;
  return shift_bytes_of(problem) + (num_pieces > 1 ? num_pieces * bias_sums_of(problem) * 4 : 0);
}

void grid_backward_cuda(const GridBackwardParams& params, const CudaWorkspace& workspace, const CudaPlace& place) {
  const GridProblem& problem = params.problem;
  const GridBackwardKernel& kernel = grid::kernel_for(kBackwardKernels, problem);
  const bool needs_grad_bias = params.grad_bias.data != nullptr;
  const DeviceGuard guard(place.device);
  const StageRange range("grid.backward");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  if (grid::is_empty(problem)) {
    if (!needs_grad_bias || bias_sums_of(problem) == 0) return;
    cuda_require(cudaMemsetAsync(params.grad_bias.data, 0, static_cast<size_t>(bias_sums_of(problem)) * 4, stream),
                 "clearing the gradient of the bias");
    return;
  }
  require(workspace.bytes >= grid_backward_workspace_bytes(params, place),
          "grid_attention_backward: the workspace is smaller than grid_backward_workspace_bytes says");
  auto* shift = static_cast<float*>(workspace.data);

  GridBackwardArguments args{};
  const bool are_groups_tiles = problem.max_tokens() <= kernel.group_tokens;
  const bool are_units_whole = problem.max_tokens() <= kernel.unit_tokens;
  if (!are_groups_tiles && !are_units_whole) launch_row_terms(params, shift, stream);
  const int64_t tokens = are_groups_tiles ? kernel.group_tokens : kernel.tokens;
  args.geometry = grid::geometry_of(problem, tokens);
  const auto scale = static_cast<float>(problem.scale);
  args.score_scale = scale * grid::kLog2E;
  args.d_score_scale = std::abs(scale) > 1.0f ? scale : 1.0f;
  args.gradient_scale = std::abs(scale) > 1.0f ? 1.0f : scale;
  args.query_steps = grid::token_steps(problem, params.query);
  args.key_steps = grid::token_steps(problem, params.key);
  args.value_steps = grid::token_steps(problem, params.value);
  args.grad_out_steps = grid::token_steps(problem, params.grad_out);
  args.grad_first_steps = grid::token_steps(problem, params.grad_key);
  args.grad_second_steps = grid::token_steps(problem, params.grad_value);
  args.grad_query_steps = grid::token_steps(problem, params.grad_query);
  args.out_steps = grid::token_steps(problem, params.out);
  args.query = params.query;
  args.key = params.key;
  args.value = params.value;
  args.grad_out = params.grad_out;
  args.bias = params.bias.at<float>();
  args.lse = params.lse.at<float>();
  args.softmax_terms = params.softmax_terms.at<float>();
  args.shift = shift;
  const int64_t shared_bytes = are_groups_tiles ? kernel.group_shared_bytes : kernel.shared_bytes;
  const cuda::LaunchShape shape{grid::blocks_for(args.geometry, tokens), dim3(static_cast<unsigned>(kernel.threads)),
                                static_cast<size_t>(shared_bytes), stream};
  args.grad_first = params.grad_key;
  args.grad_second = params.grad_value;
  args.is_first_aligned = grid::has_whole_chunks(params.grad_key);
  args.is_second_aligned = grid::has_whole_chunks(params.grad_value);
  args.grad_query = params.grad_query;
  args.is_query_aligned = grid::has_whole_chunks(params.grad_query);
  if (are_groups_tiles) {
    GridBackwardArguments of_groups = args;
    of_groups.out = params.out;
    kernel.launch_groups(of_groups, shape);
  } else if (kernel.unit_tokens > 0) {
    GridBackwardArguments of_units = args;
    of_units.geometry = grid::geometry_of(problem, kernel.unit_tokens);
    if (are_units_whole) {
      of_units.out = params.out;
    } else {
      of_units.grad_query.data = nullptr;
    }
    kernel.launch_units(of_units, {grid::blocks_for(of_units.geometry, kernel.unit_tokens),
                                   dim3(static_cast<unsigned>(kernel.unit_threads)),
                                   static_cast<size_t>(kernel.unit_shared_bytes), stream});
    if (!are_units_whole) kernel.launch_queries(args, shape);
  } else {
    kernel.launch_keys(args, shape);
    args.grad_first = params.grad_query;
    args.grad_first_steps = grid::token_steps(problem, params.grad_query);
    args.is_first_aligned = args.is_query_aligned;
    kernel.launch_queries(args, shape);
  }
  if (needs_grad_bias) {
    auto* pieces = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace.data) + shift_bytes_of(problem));
    launch_bias_gradients(params, args, pieces, stream);
  }
}

void grid::add_backward_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const GridBackwardKernel& kernel : kBackwardKernels) {
    facts.push_back({kernel.name, kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.shared_bytes});
    if (kernel.unit_tokens > 0) {
      facts.push_back(
          {"grid_unit_gradients", kernel.dtype, kernel.max_head_dim, kernel.unit_threads, kernel.unit_shared_bytes});
    }
    if (kernel.group_tokens == 0) continue;
    facts.push_back(
        {"grid_group_gradients", kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.group_shared_bytes});
  }
  for (const Dtype dtype : kCudaDtypes) {
    with_element(dtype, [&](auto element) {
      using Shared = GridBackwardSharedMemory<decltype(element), kGridBiasHeadDim>;
      facts.push_back({"grid_bias_gradients", dtype, kGridBiasHeadDim, Shared::kThreads, sizeof(Shared)});
    });
  }
}

std::vector<CudaKernelFacts> grid_cuda_kernel_facts() {
  std::vector<CudaKernelFacts> facts;
  grid::add_forward_kernel_facts(facts);
  grid::add_backward_kernel_facts(facts);
  return facts;
}

}  // namespace topgather
