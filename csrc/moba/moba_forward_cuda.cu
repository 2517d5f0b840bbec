// Block attention forward on CUDA: waves. moba_forward_cuda.cuh has the kernel that attends, moba_merge_cuda.cuh its part
// that merges a query's choices.
//
// Steps, per wave:
//   1. block lists (moba_layout_cuda.cu), of choices joined with the window where there is one (moba_window_cuda.cu);
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

// Of one wave's partial outputs.
struct Partials {
  void* out;      // [unit, entry, partial_elements] dtype
  float2* terms;  // [unit, entry]
};

struct ForwardWorkspace {
  BlockListsOnDevice lists;
  Partials partials[2];  // of a wave and the one before: the even ones', the odd ones'
};

int64_t partial_elements_of(const MobaProblem& problem) { return multiple_of(problem.value_dim, 16); }

int64_t partial_bytes_of_row(const MobaProblem& problem) {
  return problem.top_k *
         (partial_elements_of(problem) * element_bytes(problem.dtype) + static_cast<int64_t>(sizeof(float2)));
}

// One wave where it fits the budget; else there are two waves' partial outputs at a time.
WavePlan plan_forward(const MobaProblem& problem) {
  const int64_t row_bytes = list_row_bytes(problem) + partial_bytes_of_row(problem);
  const WavePlan whole =
      plan_waves(problem, {row_bytes, list_unit_bytes(problem), workspace_budget(MobaWaveConfig::kForwardBudget)});
  if (whole.num_waves() <= 1) return whole;
  return plan_waves(problem, {row_bytes + partial_bytes_of_row(problem), list_unit_bytes(problem),
                              workspace_budget(MobaWaveConfig::kForwardPairBudget)});
}

ForwardWorkspace take_workspace(const MobaProblem& problem, const WavePlan& plan, WorkspaceCutter& cutter) {
  ForwardWorkspace workspace{};
  const int64_t num_entries = plan.units_per_wave * plan.queries_per_wave * heads_per_unit(problem) * problem.top_k;
  for (int i = 0; i < (plan.num_waves() > 1 ? 2 : 1); ++i) {
    workspace.partials[i].out =
        cutter.take<unsigned char>(num_entries * partial_elements_of(problem) * element_bytes(problem.dtype));
    workspace.partials[i].terms = cutter.take<float2>(num_entries);
  }
  // Last: every wave cuts its own lists out of what is left.
  workspace.lists =
      take_lists(problem, plan.units_per_wave, plan.queries_per_wave, kernel_for(problem).entries_per_item, cutter);
  return workspace;
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
  const WavePlan plan = plan_forward(problem);
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
  for (int64_t wave_idx = 0; wave_idx < plan.num_waves(); ++wave_idx) {
    args.wave = plan.wave(problem, wave_idx);
    const Partials& partials = workspace.partials[wave_idx % 2];
    WorkspaceCutter list_cutter(workspace.lists.counts);
    args.lists = take_lists(problem, args.wave.num_units, args.wave.num_queries, kernel.entries_per_item, list_cutter);
    build_block_lists({geometry, args.wave, block_indices, args.lists, partials.terms}, stream);
    args.partial_out = partials.out;
    args.terms = partials.terms;
    if (args.lists.max_items > 0 || args.merge.rows_of_unit > 0) {
      const StageRange attention("moba.attend");
      kernel.launch(args, stream);
    }
    args.merge.wave = args.wave;
    args.merge.rows_of_unit = args.lists.num_rows;
    args.merge.partial_out = partials.out;
    args.merge.terms = partials.terms;
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
