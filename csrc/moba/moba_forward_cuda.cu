// Block attention forward on CUDA: waves. moba_forward_cuda.cuh has the kernel that attends, moba_merge_cuda.cuh its part
// that merges a query's choices.
//
// Steps, per group of waves:
//   1. block lists (moba_layout_cuda.cu), of choices joined with the window where there is one (moba_window_cuda.cu);
// per wave:
//   2. moba_attend_blocks: a normalised partial output, its maximum and sum per choice; and the merging of the wave before.
// After the last one: moba_attend_blocks without work items, which merges that wave.
#include <algorithm>

#include "moba_forward_cuda.cuh"

namespace topgather {

namespace {

const ForwardKernel& kernel_for(const MobaProblem& problem) {
  return with_element(problem.dtype, [&](auto element) -> const ForwardKernel& {
    return narrowest_kernel(forward_kernels(element), std::max(problem.head_dim, problem.value_dim));
  });
}

struct ForwardWorkspace {
  BlockListsOnDevice lists;  // of a group of waves
  void*
      outputs[2];  // [unit, entry, partial_elements] dtype: of a wave and the one before, the even ones', the odd ones'
  float2* terms[2];  // [unit, entry]: of all waves of a group, the even ones', the odd ones'
};

int64_t partial_elements_of(const MobaProblem& problem) { return multiple_of(problem.value_dim, 16); }
int64_t output_bytes_of_row(const MobaProblem& problem) {
  return problem.top_k * partial_elements_of(problem) * element_bytes(problem.dtype);
}
int64_t terms_bytes_of_row(const MobaProblem& problem) { return problem.top_k * static_cast<int64_t>(sizeof(float2)); }

struct ForwardPlan {
  WavePlan waves;
  int64_t waves_per_group;  // whose lists are built at once

  int64_t units_per_group() const { return waves_per_group * waves.units_per_wave; }
  // All of a group's units, as one wave.
  Wave group(const MobaProblem& problem, int64_t first_wave) const {
    Wave wave = waves.wave(problem, first_wave);
    wave.num_units =
        std::min(waves_per_group > 1 ? units_per_group() : wave.num_units, count_units(problem) - wave.first_unit);
    return wave;
  }
};

// One wave where it fits the budget; else there are two waves' outputs at a time, and lists of as many waves of whole
// units as there is room for.
ForwardPlan plan_forward(const MobaProblem& problem) {
  const int64_t lists = list_row_bytes(problem), of_unit = list_unit_bytes(problem);
  const int64_t outputs = output_bytes_of_row(problem), terms = terms_bytes_of_row(problem);
  const WavePlan whole =
      plan_waves(problem, {lists + outputs + terms, of_unit, workspace_budget(MobaWaveConfig::kForwardBudget)});
  if (whole.num_waves() <= 1) return {whole, 1};
  const int64_t budget = workspace_budget(MobaWaveConfig::kForwardPairBudget);
  const WavePlan waves = plan_waves(problem, {lists + 2 * (outputs + terms), of_unit, budget});
  if (waves.num_query_steps > 1) return {waves, 1};
  const int64_t rows = problem.query_len * heads_per_unit(problem);
  const int64_t left = budget - 2 * waves.units_per_wave * rows * outputs;
  const int64_t units = std::min(left / (of_unit + rows * (lists + 2 * terms)), MobaWaveConfig::kMaxUnits);
  const int64_t most = std::clamp<int64_t>(units / waves.units_per_wave, 1, waves.num_waves());
  return {waves, divide_up(waves.num_waves(), divide_up(waves.num_waves(), most))};
}

ForwardWorkspace take_workspace(const MobaProblem& problem, const ForwardPlan& plan, WorkspaceCutter& cutter) {
  ForwardWorkspace workspace{};
  const int64_t rows_of_unit = plan.waves.queries_per_wave * heads_per_unit(problem);
  for (int i = 0; i < (plan.waves.num_waves() > 1 ? 2 : 1); ++i) {
    workspace.outputs[i] =
        cutter.take<unsigned char>(plan.waves.units_per_wave * rows_of_unit * output_bytes_of_row(problem));
    workspace.terms[i] = cutter.take<float2>(plan.units_per_group() * rows_of_unit * problem.top_k);
  }
  // Last: every group cuts its own lists out of what is left.
  workspace.lists = take_lists(problem, plan.units_per_group(), plan.waves.queries_per_wave,
                               kernel_for(problem).entries_per_item, cutter);
  return workspace;
}

// The lists of some of the units, from `first_unit` on.
BlockListsOnDevice lists_from(const MobaGeometry& geometry, BlockListsOnDevice lists, int64_t first_unit) {
  lists.counts += first_unit * lists.num_chunks * geometry.num_blocks;
  lists.list_starts += first_unit * (geometry.num_blocks + 1);
  lists.item_starts += first_unit * (geometry.num_blocks + 1);
  lists.item_blocks += first_unit * lists.max_items;
  lists.entries += first_unit * lists.num_rows * geometry.top_k;
  lists.is_row_valid += first_unit * lists.num_rows;
  return lists;
}

}  // namespace

int64_t moba_forward_workspace_bytes(const MobaForwardParams& params, const CudaPlace&) {
  const MobaProblem problem = problem_with_window(params.problem);
  if (problem.query_len == 0 || count_units(problem) == 0) return 0;
  WorkspaceCutter cutter(nullptr);
  const MobaGeometry geometry = prepare_geometry(problem, 1, cutter, nullptr);
  join_window(params.problem, geometry, params.block_indices, cutter, nullptr);
  take_workspace(problem, plan_forward(problem), cutter);
  return cutter.used();
}

void moba_forward_cuda(const MobaForwardParams& params, const CudaWorkspace& given, const CudaPlace& place) {
  constexpr float kLog2E = 1.4426950408889634f;
  const MobaProblem problem = problem_with_window(params.problem);
  const ForwardKernel& kernel = kernel_for(problem);
  if (problem.query_len == 0 || count_units(problem) == 0) return;
  const DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const StageRange range("moba.forward");
  WorkspaceCutter cutter(given.data);
  const ForwardPlan plan = plan_forward(problem);
  const MobaGeometry geometry = prepare_geometry(problem, 1, cutter, stream);
  const Array<const int32_t, 4> block_indices =
      join_window(params.problem, geometry, params.block_indices, cutter, stream);
  ForwardWorkspace workspace = take_workspace(problem, plan, cutter);
  require(cutter.used() <= given.bytes,
          "moba_forward: the workspace is smaller than moba_forward_workspace_bytes says");
  ForwardArguments args{};
  args.geometry = geometry;
  args.head_dim = static_cast<int32_t>(problem.head_dim);
  args.value_dim = static_cast<int32_t>(problem.value_dim);
  args.partial_elements = static_cast<int32_t>(partial_elements_of(problem));
  args.score_scale = static_cast<float>(params.scale) * kLog2E;
  args.softcap = static_cast<float>(params.softcap) * kLog2E;
  args.query = params.query;
  args.key = params.key;
  args.value = params.value;
  args.merge.sinks = params.sinks;
  args.merge.out = params.out;
  args.merge.lse = params.lse;
  args.merge.softmax_terms = params.softmax_terms;
  args.merge.has_vector_rows =
      params.out.has_aligned_rows(16) && problem.value_dim * element_bytes(problem.dtype) % 16 == 0;
  BlockListsOnDevice lists{};  // of a group
  Wave group{};
  for (int64_t wave_idx = 0; wave_idx < plan.waves.num_waves(); ++wave_idx) {
    float2* terms_of_group = workspace.terms[wave_idx / plan.waves_per_group % 2];
    if (wave_idx % plan.waves_per_group == 0) {
      group = plan.group(problem, wave_idx);
      WorkspaceCutter list_cutter(workspace.lists.counts);
      lists = take_lists(problem, group.num_units, group.num_queries, kernel.entries_per_item, list_cutter);
      build_block_lists({geometry, group, block_indices, lists, terms_of_group}, stream);
    }
    args.wave = plan.waves.wave(problem, wave_idx);
    const int64_t unit_in_group = args.wave.first_unit - group.first_unit;
    args.lists = lists_from(geometry, lists, unit_in_group);
    args.partial_out = workspace.outputs[wave_idx % 2];
    args.terms = terms_of_group + unit_in_group * lists.num_rows * geometry.top_k;
    if (lists.max_items > 0 || args.merge.rows_of_unit > 0) {
      const StageRange attention("moba.attend");
      kernel.launch(args, stream);
    }
    args.merge.wave = args.wave;
    args.merge.rows_of_unit = lists.num_rows;
    args.merge.partial_out = args.partial_out;
    args.merge.terms = args.terms;
  }
  const StageRange merge("moba.merge");
  args.lists.max_items = 0;  // nothing to attend to
  kernel.launch(args, stream);
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
