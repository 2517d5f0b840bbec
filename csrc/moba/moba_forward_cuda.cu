// Block attention forward on CUDA: waves, and the merging of a query's choices. moba_forward_cuda.cuh has the kernel
// that attends.
//
// Steps, per wave:
//   1. block lists (moba_layout_cuda.cu);
//   2. moba_attend_blocks: a normalised partial output, its maximum and sum per choice;
//   3. moba_merge_slots: a warp takes a query's row and combines its choices.
#include <algorithm>

#include "../common/softmax_terms.h"
#include "moba_forward_cuda.cuh"

namespace topgather {

namespace {

constexpr int kMergeWarps = 8;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace

struct MergeArguments {
  MobaGeometry geometry;
  Wave wave;
  int64_t num_rows;  // of a unit
  int32_t value_dim;
  int32_t partial_elements;
  Array<const int32_t, 4> block_indices;  // [batch, query head, query, K] int32
  Array<const void, 1> sinks;             // [query head] float32, or data null
  const uint16_t* is_row_valid;           // [unit, row] uint16
  const void* partial_out;                // [unit, entry, partial_elements] dtype
  const float* partial_max;               // [unit, entry] float32, base 2
  const float* partial_sum;               // [unit, entry] float32
  Array<void, 4> out;                     // [batch, query head, query, V] dtype
  Array<void, 3> lse;                     // [batch, query head, query] float32
  Array<void, 4> softmax_terms;           // [batch, query head, query, 2] float32
};

// A lane takes a slot while weights are made, 32 slots at a time, and neighbouring columns while they are applied, slot
// by slot in order, so that the sum is the same every time. A row without a visible key: out 0, lse -inf. One all of
// whose scores are -inf: NaN, as plain softmax. One whose choices are not valid: NaN.
template <typename Element>
__global__ void __launch_bounds__(kMergeWarps* cuda::kLanes, 1) moba_merge_slots(const MergeArguments args) {
  constexpr int kPairs = 4;  // of columns a lane holds: 256 columns a warp
  const MobaGeometry& geometry = args.geometry;
  const int lane = cuda::lane_id();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeWarps + cuda::warp_id();
  if (row >= args.num_rows) return;  // whole warps, and no barrier follows
  const Unit unit = unit_at(geometry, args.wave.first_unit + blockIdx.y);
  const WaveRow place = wave_row(geometry, args.wave, unit, row);
  const SequenceOnDevice sequence = sequence_of_query(geometry, place.query);
  const int32_t* choices = args.block_indices.at<int32_t>(unit.batch_idx, place.head, place.query);
  const int64_t first_entry = (blockIdx.y * args.num_rows + row) * geometry.top_k;
  const bool is_valid = args.is_row_valid[blockIdx.y * args.num_rows + row] != 0;
  const auto sees_keys = [&](int slot) {
    return is_valid && slot < geometry.top_k && num_visible_keys(geometry, sequence, place.query, choices[slot]) > 0;
  };

  float maximum = -INFINITY;
  bool sees_any = false;
  for (int slot = lane; slot < geometry.top_k; slot += cuda::kLanes) {
    if (!sees_keys(slot)) continue;
    sees_any = true;
    maximum = cuda::max_or_nan(maximum, args.partial_max[first_entry + slot]);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    maximum = cuda::max_or_nan(maximum, __shfl_xor_sync(cuda::kAllLanes, maximum, distance));
  }
  sees_any = __any_sync(cuda::kAllLanes, sees_any);
  // Only scores of -inf: any finite base keeps -inf - base from being NaN.
  const float base = maximum == -INFINITY ? 0.0f : maximum;

  const auto* partials = static_cast<const Element*>(args.partial_out) + first_entry * args.partial_elements;
  float result[kPairs][2] = {};
  float sum = 0.0f;
  for (int first = 0; first < geometry.top_k; first += cuda::kLanes) {
    const bool sees = sees_keys(first + lane);
    const int64_t entry = first_entry + first + lane;
    const float weight_of_lane = sees ? args.partial_sum[entry] * exp2f(args.partial_max[entry] - base) : 0.0f;
    const unsigned seen = __ballot_sync(cuda::kAllLanes, sees);
    const int count = min(cuda::kLanes, geometry.top_k - first);
    for (int i = 0; i < count; ++i) {
      if ((seen >> i & 1) == 0) continue;
      const float weight = __shfl_sync(cuda::kAllLanes, weight_of_lane, i);
      sum += weight;
      const Element* partial = partials + static_cast<int64_t>(first + i) * args.partial_elements;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int column = (p * cuda::kLanes + lane) * 2;
        if (column >= args.value_dim) continue;
        const float2 pair = cuda::load_pair(partial + column);
        result[p][0] = fmaf(weight, pair.x, result[p][0]);
        result[p][1] = fmaf(weight, pair.y, result[p][1]);
      }
    }
  }
  float lse = fabsf(maximum) < INFINITY ? (maximum + log2f(sum)) * kLn2 : maximum;
  if (!sees_any) lse = is_valid ? -INFINITY : NAN;
  // Seen, but all at -inf: 0 / 0, unless a sink gives the sum something. Not seen: 0.
  const float share = cuda::share_beside_sink(lse, args.sinks, place.head);
  const bool is_zero = is_valid && (!sees_any || (lse == -INFINITY && cuda::has_sink(args.sinks, place.head)));
  const float factor = is_valid ? share / sum : NAN;
  Element* out = args.out.at<Element>(unit.batch_idx, place.head, place.query);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int column = (p * cuda::kLanes + lane) * 2;
    cuda::store_row_pair(out, column, args.value_dim, is_zero ? 0.0f : result[p][0] * factor,
                         is_zero ? 0.0f : result[p][1] * factor);
  }
  if (lane == 0) {
    *args.lse.at<float>(unit.batch_idx, place.head, place.query) = lse;
    write_softmax_terms(maximum, is_valid ? sum : NAN,
                        args.softmax_terms.at<float>(unit.batch_idx, place.head, place.query));
  }
}

namespace {

const ForwardKernel& kernel_for(const MobaProblem& problem) {
  return with_element(problem.dtype, [&](auto element) -> const ForwardKernel& {
    return narrowest_kernel(forward_kernels(element), std::max(problem.head_dim, problem.value_dim));
  });
}

struct ForwardWorkspace {
  BlockListsOnDevice lists;
  void* partial_out;   // [unit, entry, partial_elements] dtype
  float* partial_max;  // [unit, entry] float32
  float* partial_sum;  // [unit, entry] float32
};

int64_t partial_elements_of(const MobaProblem& problem) { return multiple_of(problem.value_dim, 16); }

WavePlan plan_forward(const MobaProblem& problem) {
  const int64_t entry_bytes = partial_elements_of(problem) * element_bytes(problem.dtype) + 8;
  return plan_waves(problem, {list_row_bytes(problem) + problem.top_k * entry_bytes, list_unit_bytes(problem),
                              workspace_budget(MobaWaveConfig::kForwardBudget)});
}

ForwardWorkspace take_workspace(const MobaProblem& problem, int64_t num_units, int64_t num_queries,
                                WorkspaceCutter& cutter) {
  ForwardWorkspace workspace{};
  workspace.lists = take_lists(problem, num_units, num_queries, kernel_for(problem).entries_per_item, cutter);
  const int64_t num_entries = num_units * workspace.lists.num_rows * problem.top_k;
  workspace.partial_out =
      cutter.take<unsigned char>(num_entries * partial_elements_of(problem) * element_bytes(problem.dtype));
  workspace.partial_max = cutter.take<float>(num_entries);
  workspace.partial_sum = cutter.take<float>(num_entries);
  return workspace;
}

void merge(Dtype dtype, const MergeArguments& args, cudaStream_t stream) {
  const StageRange range("moba: merge");
  const cuda::LaunchShape shape{
      dim3(static_cast<unsigned>(divide_up(args.num_rows, kMergeWarps)), static_cast<unsigned>(args.wave.num_units)),
      dim3(kMergeWarps * cuda::kLanes), 0, stream};
  with_element(dtype, [&](auto element) { cuda::launch(moba_merge_slots<decltype(element)>, shape, args); });
}

}  // namespace

int64_t moba_forward_workspace_bytes(const MobaForwardParams& params, const CudaPlace&) {
  const MobaProblem& problem = params.problem;
  if (problem.query_len == 0 || count_units(problem) == 0) return 0;
  WorkspaceCutter cutter(nullptr);
  const WavePlan plan = plan_forward(problem);
  prepare_geometry(problem, 1, cutter, nullptr);
  take_workspace(problem, plan.units_per_wave, plan.queries_per_wave, cutter);
  return cutter.used();
}

void moba_forward_cuda(const MobaForwardParams& params, const CudaWorkspace& given, const CudaPlace& place) {
  const MobaProblem& problem = params.problem;
  const ForwardKernel& kernel = kernel_for(problem);
  if (problem.query_len == 0 || count_units(problem) == 0) return;
  const DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const StageRange range("moba: forward");
  WorkspaceCutter cutter(given.data);
  const WavePlan plan = plan_forward(problem);
  const MobaGeometry geometry = prepare_geometry(problem, 1, cutter, stream);
  const WorkspaceCutter wave_start = cutter;
  take_workspace(problem, plan.units_per_wave, plan.queries_per_wave, cutter);
  require(cutter.used() <= given.bytes,
          "moba_forward: the workspace is smaller than moba_forward_workspace_bytes says");
  for (int64_t wave_idx = 0; wave_idx < plan.num_waves(); ++wave_idx) {
    const Wave wave = plan.wave(problem, wave_idx);
    WorkspaceCutter wave_cutter = wave_start;
    const ForwardWorkspace workspace = take_workspace(problem, wave.num_units, wave.num_queries, wave_cutter);
    build_block_lists({geometry, wave, params.block_indices, workspace.lists}, stream);
    if (workspace.lists.max_items > 0) {
      const StageRange attention("moba: attention");
      ForwardArguments args{};
      args.geometry = geometry;
      args.wave = wave;
      args.lists = workspace.lists;
      args.head_dim = static_cast<int32_t>(problem.head_dim);
      args.value_dim = static_cast<int32_t>(problem.value_dim);
      args.partial_elements = static_cast<int32_t>(partial_elements_of(problem));
      args.score_scale = static_cast<float>(params.scale) * kLog2E;
      args.softcap = static_cast<float>(params.softcap) * kLog2E;
      args.query = params.query;
      args.key = params.key;
      args.value = params.value;
      args.partial_out = workspace.partial_out;
      args.partial_max = workspace.partial_max;
      args.partial_sum = workspace.partial_sum;
      kernel.launch(args, stream);
    }
    merge(problem.dtype,
          {geometry, wave, workspace.lists.num_rows, static_cast<int32_t>(problem.value_dim),
           static_cast<int32_t>(partial_elements_of(problem)), params.block_indices, params.sinks,
           workspace.lists.is_row_valid, workspace.partial_out, workspace.partial_max, workspace.partial_sum,
           params.out, params.lse, params.softmax_terms},
          stream);
  }
}

void add_forward_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const Dtype dtype : kCudaDtypes) {
    with_element(dtype, [&](auto element) {
      for (const ForwardKernel& kernel : forward_kernels(element)) {
        facts.push_back({"moba_attend_blocks", kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.shared_bytes});
      }
    });
  }
}

}  // namespace topgather
