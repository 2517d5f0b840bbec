// The choice of blocks on CUDA: centroids, their cutting into parts, and the launches. moba_route_cuda.cuh has the
// kernel that scores and selects.
//
// Units are taken in steps, so that their centroids fit a bounded workspace. Steps, per unit step:
//   1. centroids in float32 (moba_block_centroids);
//   2. moba_split_centroids: each centroid as a sum of kCentroidParts numbers of the element type;
//   3. moba_route; where there are many blocks moba_route_filter, and moba_route for the rows it could not tell.
// float16 reaches from 6e-8 to 65504 only: centroids are scaled by a power of two that brings the unit's largest to the
// top of that range. Scores of a unit all scale alike, so that their order stays.
#include <algorithm>
#include <bit>

#include "moba_route_cuda.cuh"

namespace topgather {

namespace {

constexpr int kSplitThreads = 256;
constexpr int kSplitWarps = kSplitThreads / kLanes;
constexpr int64_t kMaxThreadBlocks = 2048;  // of the router where lists lie in global memory

struct RouteWorkspace {
  float* centroids;      // [unit, block, row_elements] float32
  void* parts;           // [unit, block, part, row_elements] dtype; none for float32
  uint32_t* largest;     // [unit] bits of the largest finite magnitude; float16 only
  float* list_scores;    // [thread block, row, list_length] float32; where lists do not fit shared memory
  int32_t* list_blocks;  // [thread block, row, list_length] int32
  float* bounds;         // [unit, block] float32; of moba_route_filter, as what follows
  uint32_t* failed;      // [work, warp] uint32
};

}  // namespace

struct SplitArguments {
  MobaGeometry geometry;
  const float* centroids;   // [unit, block, row_elements] float32
  void* parts;              // [unit, block, part, row_elements] dtype
  float* bounds;            // [unit, block] float32, or null
  const uint32_t* largest;  // [unit]; null for no scaling
  int32_t row_elements;
};

// A warp takes a centroid.
template <typename Element>
__global__ void __launch_bounds__(kSplitThreads) moba_split_centroids(const SplitArguments args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSplitWarps + warp_id();
  if (row >= existing_blocks(args.geometry)) return;  // whole warps
  constexpr int kParts = kCentroidParts<Element>;
  float scale = 1.0f;
  if (args.largest != nullptr) {
    // The largest becomes at least 2^14 and less than 2^15. A zero or subnormal largest is scaled as far as floats go.
    const int exponent = static_cast<int>(args.largest[blockIdx.y] >> 23) - 127;
    const int shift = 14 - exponent;
    scale = __uint_as_float(static_cast<uint32_t>((shift > 127 ? 127 : (shift < -126 ? -126 : shift)) + 127) << 23);
  }
  const int64_t row_of_units = blockIdx.y * args.geometry.num_blocks + row;
  const float* centroid = args.centroids + row_of_units * args.row_elements;
  Element* part = static_cast<Element*>(args.parts) + row_of_units * args.row_elements * kParts;
  float squares = 0.0f, squares_of_rest = 0.0f;
  for (int column = lane_id(); column < args.row_elements; column += kLanes) {
    float rest = centroid[column] * scale;
    squares = fmaf(rest, rest, squares);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const Element head = cuda::from_float<Element>(rest);
      part[p * args.row_elements + column] = head;
      // inf less inf would be NaN: the first part says it all.
      rest = fabsf(cuda::to_float(head)) < INFINITY ? rest - cuda::to_float(head) : 0.0f;
      if (p == 0) squares_of_rest = fmaf(rest, rest, squares_of_rest);
    }
  }
  if (args.bounds == nullptr) return;
  const float norm = sqrtf(cuda::sum_over_lanes(squares)), norm_of_rest = sqrtf(cuda::sum_over_lanes(squares_of_rest));
  const float bound = fmaf(norm_of_rest, route::kNormSlack, fmaf(norm, route::kSumError, route::kTinyNorm));
  if (lane_id() == 0) args.bounds[row_of_units] = norm < route::kLargeNorm ? bound : INFINITY;
}

namespace {

const RouteKernel& kernel_for(const MobaProblem& problem) {
  return with_element(problem.dtype, [&](auto element) -> const RouteKernel& {
    return narrowest_kernel(route_kernels(element), problem.head_dim);
  });
}

int64_t parts_of(Dtype dtype) {
  return with_element(dtype, [](auto element) -> int64_t {
    using Element = decltype(element);
    return std::is_same_v<Element, float> ? 0 : kCentroidParts<Element>;
  });
}

// Blocks kept by score: top_k, less those forced, at most as many as there are.
int64_t list_length_of(const MobaRouteParams& params) {
  const MobaProblem& problem = params.problem;
  return std::min(problem.top_k - params.force_first - params.force_last, blocks_per_unit(problem));
}

int64_t tiles_per_head(const MobaProblem& problem, int64_t queries_per_tile) {
  if (!is_packed(problem)) return divide_up(problem.query_len, queries_per_tile);
  // At least one, that finds no sequence to belong to, where there are tokens but no sequences.
  return std::max<int64_t>(problem.query_len / queries_per_tile + std::min(problem.batch_size, problem.query_len), 1);
}

struct RoutePlan {
  const RouteKernel* kernel;
  int64_t list_length;
  int64_t row_elements;
  int64_t units_per_step;
  int64_t num_tiles;
  int64_t thread_blocks;  // of one launch
  size_t shared_bytes;
  bool are_lists_shared;
  bool is_filtered;
};

// Whether moba_route_filter pays, and can: moba_route_filter_cuda.cuh.
bool takes_filter(const MobaProblem& problem, const RouteKernel& kernel, int64_t list_length) {
  using Config = MobaRouteFilterConfig;
  const int64_t num_sequences = is_packed(problem) ? std::max<int64_t>(problem.batch_size, 1) : 1;
  const int64_t num_blocks = blocks_per_unit(problem);
  return kernel.launch_filter != nullptr && problem.head_dim == kernel.max_head_dim && list_length > 0 &&
         list_length <= Config::kMaxChosen && num_blocks / num_sequences >= Config::kMinBlocks &&
         num_blocks <= Config::kMaxBlocks;
}

RoutePlan plan_route(const MobaRouteParams& params) {
  const MobaProblem& problem = params.problem;
  RoutePlan plan{};
  plan.kernel = &kernel_for(problem);
  plan.list_length = list_length_of(params);
  plan.row_elements = multiple_of(problem.head_dim, 16);
  plan.num_tiles = tiles_per_head(problem, plan.kernel->queries_per_tile);
  const int64_t budget = workspace_budget(MobaWaveConfig::kRouteBudget);
  const int64_t unit_bytes = blocks_per_unit(problem) * plan.row_elements * (4 + 2 * parts_of(problem.dtype)) + 4;
  // Work is numbered in 31 bits.
  const int64_t max_by_index = INT32_MAX / (plan.num_tiles * heads_per_unit(problem));
  require(max_by_index >= 1, "moba_route: more than 2^31 - 1 tiles of queries in one key head");
  plan.units_per_step = std::clamp<int64_t>(std::min(budget / unit_bytes, max_by_index), 1, count_units(problem));
  const int64_t work = plan.num_tiles * plan.units_per_step * heads_per_unit(problem);
  plan.shared_bytes = plan.kernel->shared_bytes(plan.list_length);
  plan.are_lists_shared = plan.shared_bytes <= cuda::max_shared_bytes();
  plan.thread_blocks = work;
  if (!plan.are_lists_shared) {
    plan.shared_bytes = plan.kernel->shared_bytes(0);
    const int64_t list_bytes = plan.kernel->queries_per_tile * plan.list_length * 8;
    const int64_t max_blocks = std::clamp<int64_t>((budget / 2) / list_bytes, 1, kMaxThreadBlocks);
    plan.thread_blocks = std::min(work, max_blocks);
  }
  plan.is_filtered = plan.are_lists_shared && takes_filter(problem, *plan.kernel, plan.list_length);
  return plan;
}

RouteWorkspace take_workspace(const MobaProblem& problem, const RoutePlan& plan, WorkspaceCutter& cutter) {
  RouteWorkspace workspace{};
  if (plan.list_length == 0) return workspace;
  const int64_t centroid_elements = plan.units_per_step * blocks_per_unit(problem) * plan.row_elements;
  workspace.centroids = cutter.take<float>(centroid_elements);
  if (problem.dtype != Dtype::kFloat32) {
    workspace.parts = cutter.take<uint16_t>(centroid_elements * parts_of(problem.dtype));
  }
  if (problem.dtype == Dtype::kFloat16) workspace.largest = cutter.take<uint32_t>(plan.units_per_step);
  if (!plan.are_lists_shared) {
    const int64_t entries = plan.thread_blocks * plan.kernel->queries_per_tile * plan.list_length;
    workspace.list_scores = cutter.take<float>(entries);
    workspace.list_blocks = cutter.take<int32_t>(entries);
  }
  if (plan.is_filtered) {
    workspace.bounds = cutter.take<float>(plan.units_per_step * blocks_per_unit(problem));
    workspace.failed = cutter.take<uint32_t>(plan.thread_blocks * (plan.kernel->threads / kLanes));
  }
  return workspace;
}

template <typename Element>
void split(const SplitArguments& args, int64_t num_units, cudaStream_t stream) {
  const int64_t unit_elements = args.geometry.num_blocks * args.row_elements;
  const auto grid_x = static_cast<unsigned>(divide_up(args.geometry.num_blocks, kSplitWarps));
  for (int64_t done = 0; done < num_units; done += MobaWaveConfig::kMaxUnits) {
    SplitArguments part = args;
    part.centroids += done * unit_elements;
    part.parts = static_cast<Element*>(args.parts) + done * unit_elements * kCentroidParts<Element>;
    if (args.bounds != nullptr) part.bounds += done * args.geometry.num_blocks;
    if (args.largest != nullptr) part.largest += done;
    const auto count = static_cast<unsigned>(std::min(num_units - done, MobaWaveConfig::kMaxUnits));
    cuda::launch(moba_split_centroids<Element>, {dim3(grid_x, count), dim3(kSplitThreads), 0, stream}, part);
  }
}

// Steps 1 and 2.
void prepare_centroids(const MobaRouteParams& params, const MobaGeometry& geometry, const RoutePlan& plan,
                       const RouteWorkspace& workspace, int64_t first_unit, int64_t num_units, cudaStream_t stream) {
  if (workspace.largest != nullptr) {
    cuda_require(cudaMemsetAsync(workspace.largest, 0, static_cast<size_t>(num_units) * 4, stream),
                 "clearing the largest magnitudes");
  }
  CentroidArguments centroids{};
  centroids.geometry = geometry;
  centroids.first_unit = first_unit;
  centroids.head_dim = params.problem.head_dim;
  centroids.row_elements = plan.row_elements;
  centroids.key = params.key;
  centroids.centroids = {
      workspace.centroids, {}, {0, geometry.num_blocks * plan.row_elements, plan.row_elements, 1}, Dtype::kFloat32};
  centroids.largest = workspace.largest;
  centroids.is_by_unit = true;
  launch_centroids(params.problem.dtype, centroids, num_units, stream);
  const SplitArguments args{geometry,         workspace.centroids, workspace.parts,
                            workspace.bounds, workspace.largest,   static_cast<int32_t>(plan.row_elements)};
  with_element(params.problem.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (!std::is_same_v<Element, float>) split<Element>(args, num_units, stream);
  });
}

}  // namespace

int64_t moba_route_workspace_bytes(const MobaRouteParams& params, const CudaPlace& place) {
  const MobaProblem& problem = params.problem;
  if (problem.query_len == 0 || count_units(problem) == 0) return 0;
  const DeviceGuard guard(place.device);
  WorkspaceCutter cutter(nullptr);
  const RoutePlan plan = plan_route(params);
  prepare_geometry(problem, plan.kernel->queries_per_tile, cutter, nullptr);
  take_workspace(problem, plan, cutter);
  return cutter.used();
}

void moba_route_cuda(const MobaRouteParams& params, const CudaWorkspace& given, const CudaPlace& place) {
  const MobaProblem& problem = params.problem;
  if (problem.query_len == 0 || count_units(problem) == 0) return;
  const DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const StageRange range("moba.route");
  const RoutePlan plan = plan_route(params);
  WorkspaceCutter cutter(given.data);
  if (is_packed(problem)) {
    // Rows past the last boundary choose nothing: -1 is all ones. The tensor is contiguous.
    const size_t bytes = static_cast<size_t>(problem.num_query_heads * problem.query_len * problem.top_k) * 4;
    cuda_require(cudaMemsetAsync(params.block_indices.data, 0xff, bytes, stream), "clearing block_indices");
  }
  const MobaGeometry geometry = prepare_geometry(problem, plan.kernel->queries_per_tile, cutter, stream);
  const RouteWorkspace workspace = take_workspace(problem, plan, cutter);
  require(cutter.used() <= given.bytes, "moba_route: the workspace is smaller than moba_route_workspace_bytes says");
  const int64_t num_units = count_units(problem);
  for (int64_t first_unit = 0; first_unit < num_units; first_unit += plan.units_per_step) {
    const int64_t count = std::min(plan.units_per_step, num_units - first_unit);
    if (plan.list_length > 0 && geometry.num_blocks > 0) {
      prepare_centroids(params, geometry, plan, workspace, first_unit, count, stream);
    }
    RouteArguments args{};
    args.geometry = geometry;
    args.first_unit = first_unit;
    args.num_tiles = static_cast<uint32_t>(plan.num_tiles);
    args.num_work = static_cast<uint32_t>(plan.num_tiles * count * geometry.group);
    args.list_length = static_cast<int32_t>(plan.list_length);
    args.force_first = static_cast<int32_t>(params.force_first);
    args.force_last = static_cast<int32_t>(params.force_last);
    args.has_lane_lists = plan.are_lists_shared && plan.list_length <= route::kMaxLaneList;
    args.head_dim = static_cast<int32_t>(problem.head_dim);
    args.row_elements = static_cast<int32_t>(plan.row_elements);
    args.are_lists_shared = plan.are_lists_shared;
    args.query = params.query;
    args.parts = problem.dtype == Dtype::kFloat32 ? workspace.centroids : workspace.parts;
    args.centroids = workspace.centroids;
    args.list_scores = workspace.list_scores;
    args.list_blocks = workspace.list_blocks;
    args.block_indices = params.block_indices;
    int64_t thread_blocks = std::min<int64_t>(plan.thread_blocks, args.num_work);
    if (plan.is_filtered) {
      args.bounds = workspace.bounds;
      args.failed = workspace.failed;
      args.block_mask = std::bit_ceil(static_cast<uint32_t>(geometry.num_blocks)) - 1;
      plan.kernel->launch_filter(args, stream);
      thread_blocks = divide_up(args.num_work, MobaRouteFilterConfig::kTilesPerRerun);
    }
    plan.kernel->launch(args, thread_blocks, plan.shared_bytes, stream);
  }
}

void add_route_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const Dtype dtype : kCudaDtypes) {
    with_element(dtype, [&](auto element) {
      for (const RouteKernel& kernel : route_kernels(element)) {
        facts.push_back({"moba_route", kernel.dtype, kernel.max_head_dim, kernel.threads,
                         static_cast<int64_t>(kernel.shared_bytes(8))});
      }
      for (const RouteKernel& kernel : route_kernels(element)) {
        if (kernel.launch_filter == nullptr) continue;
        facts.push_back(
            {"moba_route_filter", kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.filter_shared_bytes});
      }
    });
  }
}

}  // namespace topgather
