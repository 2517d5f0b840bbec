// Block attention backward on CUDA: waves, the sums it starts from and the rounding it ends with.
// moba_backward_cuda.cuh has the kernel that differentiates.
//
// Steps, per wave:
//   1. block lists (moba_layout_cuda.cu);
//   2. moba_row_terms: a warp takes a query's row, shift = dot(grad_out, out) - grad_lse;
//   3. moba_attend_blocks_backward: float32 sums of all three gradients;
//   4. moba_write_grad_query: a warp takes a query's row and rounds it, the deterministic way summing its slots in
//      order;
//   after a unit's last wave:
//   5. moba_write_grad_keys: a warp takes a row of the gradients of keys and values and rounds it.
#include <algorithm>
#include <cmath>

#include "moba_backward_cuda.cuh"

namespace topgather {

namespace {

constexpr int kRowWarps = 8;
constexpr int kRowThreads = kRowWarps * cuda::kLanes;
// Minimum budget of a wave beside the float32 gradients of keys of its unit.
constexpr int64_t kMinWaveBytes = int64_t{128} << 20;

}  // namespace

struct RowArguments {
  MobaGeometry geometry;
  Wave wave;
  int64_t num_rows;  // of a unit
  int32_t head_dim;
  int32_t value_dim;
  int32_t key_elements;
  bool is_deterministic;
  Array<const int32_t, 4> block_indices;  // [batch, query head, query, K] int32
  Array<const void, 4> out;               // [batch, query head, query, V] dtype
  Array<const void, 4> grad_out;          // [batch, query head, query, V] dtype
  Array<const void, 3> grad_lse;          // [batch, query head, query] float32; data null when absent
  const uint16_t* is_row_valid;           // [unit, row] uint16
  float* row_shift;                       // [unit, row] float32
  const float* sums;          // [unit, row, key_elements] float32; deterministic: [unit, entry, key_elements]
  Array<void, 4> grad_query;  // [batch, query head, query, D] dtype
};

// Step 2.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads, 1) moba_row_terms(const RowArguments args) {
  const int lane = cuda::lane_id();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + cuda::warp_id();
  if (row >= args.num_rows) return;  // whole warps, and no barrier follows
  const Unit unit = unit_at(args.geometry, args.wave.first_unit + blockIdx.y);
  const WaveRow place = wave_row(args.geometry, args.wave, unit, row);
  const Element* out = args.out.at<Element>(unit.batch_idx, place.head, place.query);
  const Element* grad_out = args.grad_out.at<Element>(unit.batch_idx, place.head, place.query);
  float sum = 0.0f;
  for (int column = lane; column < args.value_dim; column += cuda::kLanes) {
    sum = fmaf(cuda::to_float(out[column]), cuda::to_float(grad_out[column]), sum);
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(cuda::kAllLanes, sum, distance);
  if (lane != 0) return;
  if (args.grad_lse.data != nullptr) sum -= *args.grad_lse.at<float>(unit.batch_idx, place.head, place.query);
  args.row_shift[blockIdx.y * args.num_rows + row] = sum;
}

// Step 4. A row whose choices are not valid: NaN.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads, 1) moba_write_grad_query(const RowArguments args) {
  const MobaGeometry& geometry = args.geometry;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + cuda::warp_id();
  if (row >= args.num_rows) return;  // whole warps, and no barrier follows
  const Unit unit = unit_at(geometry, args.wave.first_unit + blockIdx.y);
  const WaveRow place = wave_row(geometry, args.wave, unit, row);
  const SequenceOnDevice sequence = sequence_of_query(geometry, place.query);
  const int32_t* choices = args.block_indices.at<int32_t>(unit.batch_idx, place.head, place.query);
  const int64_t row_of_wave = blockIdx.y * args.num_rows + row;
  const bool is_valid = args.is_row_valid[row_of_wave] != 0;
  Element* grad_query = args.grad_query.at<Element>(unit.batch_idx, place.head, place.query);
  for (int column = cuda::lane_id() * 2; column < args.head_dim; column += 2 * cuda::kLanes) {
    float2 sum = make_float2(0.0f, 0.0f);
    if (!is_valid) {
      sum = make_float2(NAN, NAN);
    } else if (args.is_deterministic) {
      for (int slot = 0; slot < geometry.top_k; ++slot) {
        if (num_visible_keys(geometry, sequence, place.query, choices[slot]) == 0) continue;
        const float2 part =
            cuda::load_pair(args.sums + (row_of_wave * geometry.top_k + slot) * args.key_elements + column);
        sum = make_float2(sum.x + part.x, sum.y + part.y);
      }
    } else {
      sum = cuda::load_pair(args.sums + row_of_wave * args.key_elements + column);
    }
    cuda::store_row_pair(grad_query, column, args.head_dim, sum.x, sum.y);
  }
}

struct KeyRowArguments {
  MobaGeometry geometry;
  int64_t first_unit;
  int32_t num_columns;   // of a row of the gradient
  int32_t sum_elements;  // of a row of sums
  const float* sums;     // [unit, key, sum_elements] float32
  Array<void, 4> grad;   // [batch, kv head, key, num_columns] dtype
};

// Step 5, for keys or for values.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads, 1) moba_write_grad_keys(const KeyRowArguments args) {
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kRowWarps + cuda::warp_id();
  if (key >= args.geometry.key_len) return;  // whole warps, and no barrier follows
  const Unit unit = unit_at(args.geometry, args.first_unit + blockIdx.y);
  const float* sums = args.sums + (blockIdx.y * args.geometry.key_len + key) * args.sum_elements;
  Element* grad = args.grad.at<Element>(unit.batch_idx, unit.kv_head, key);
  for (int column = cuda::lane_id() * 2; column < args.num_columns; column += 2 * cuda::kLanes) {
    const float2 sum = cuda::load_pair(sums + column);
    cuda::store_row_pair(grad, column, args.num_columns, sum.x, sum.y);
  }
}

namespace {

const BackwardKernel& kernel_for(const MobaProblem& problem) {
  return with_element(problem.dtype, [&](auto element) -> const BackwardKernel& {
    return narrowest_kernel(backward_kernels(element), std::max(problem.head_dim, problem.value_dim));
  });
}

struct BackwardWorkspace {
  float* grad_key;    // [unit, key, key_elements] float32
  float* grad_value;  // [unit, key, value_elements] float32
  BlockListsOnDevice lists;
  float* row_shift;   // [unit, row] float32
  float* grad_query;  // [unit, row or entry, key_elements] float32
  int64_t num_grad_query;
};

int64_t elements_of(int64_t dim) { return multiple_of(dim, 16); }

WavePlan plan_backward(const MobaProblem& problem, bool is_deterministic) {
  const int64_t sums_per_row = is_deterministic ? problem.top_k : 1;
  const int64_t row_bytes = list_row_bytes(problem) + 4 + sums_per_row * elements_of(problem.head_dim) * 4;
  const int64_t unit_bytes =
      list_unit_bytes(problem) + problem.key_len * (elements_of(problem.head_dim) + elements_of(problem.value_dim)) * 4;
  const int64_t budget = workspace_budget(MobaWaveConfig::kBackwardBudget);
  const int64_t min_budget = unit_bytes + std::min(budget, kMinWaveBytes);
  return plan_waves(problem, {row_bytes, unit_bytes, std::max(budget, min_budget)});
}

BackwardWorkspace take_workspace(const MobaProblem& problem, bool is_deterministic, int64_t num_units,
                                 int64_t num_queries, WorkspaceCutter& cutter) {
  BackwardWorkspace workspace{};
  // Gradients of keys come first: a unit's waves differ in what follows.
  workspace.grad_key = cutter.take<float>(num_units * problem.key_len * elements_of(problem.head_dim));
  workspace.grad_value = cutter.take<float>(num_units * problem.key_len * elements_of(problem.value_dim));
  const int64_t entries_per_item = is_deterministic ? INT32_MAX : kernel_for(problem).entries_per_item;
  workspace.lists = take_lists(problem, num_units, num_queries, entries_per_item, cutter);
  const int64_t num_rows = num_units * workspace.lists.num_rows;
  workspace.row_shift = cutter.take<float>(num_rows);
  workspace.num_grad_query = num_rows * (is_deterministic ? problem.top_k : 1) * elements_of(problem.head_dim);
  workspace.grad_query = cutter.take<float>(workspace.num_grad_query);
  return workspace;
}

void clear(float* sums, int64_t count, cudaStream_t stream) {
  cuda_require(cudaMemsetAsync(sums, 0, static_cast<size_t>(count) * sizeof(float), stream), "clearing gradient sums");
}

// Step 3. The deterministic way takes the chunks of large blocks one after the other: each adds to the same rows.
void attend_backward(const BackwardKernel& kernel, BackwardArguments args, cudaStream_t stream) {
  if (args.lists.max_items == 0) return;
  const StageRange range("moba: attention backward");
  const auto num_chunks = static_cast<int32_t>(divide_up(args.geometry.block_size, kernel.keys_per_chunk));
  const auto needed = static_cast<int32_t>(divide_up(args.geometry.key_len, kernel.keys_per_chunk));
  args.num_chunks = std::min(num_chunks, needed);
  if (!args.is_deterministic) return kernel.launch(args, stream);
  const int32_t last = args.num_chunks;
  args.num_chunks = 1;
  for (args.first_chunk = 0; args.first_chunk < last; ++args.first_chunk) kernel.launch(args, stream);
}

void write_grad_keys(const MobaProblem& problem, const MobaGeometry& geometry, int64_t first_unit, int64_t num_units,
                     const float* sums, const Array<void, 4>& grad, int64_t dim, cudaStream_t stream) {
  if (problem.key_len == 0 || dim == 0) return;
  const KeyRowArguments args{geometry, first_unit, static_cast<int32_t>(dim), static_cast<int32_t>(elements_of(dim)),
                             sums,     grad};
  const cuda::LaunchShape shape{
      dim3(static_cast<unsigned>(divide_up(problem.key_len, kRowWarps)), static_cast<unsigned>(num_units)),
      dim3(kRowThreads), 0, stream};
  with_element(problem.dtype,
               [&](auto element) { cuda::launch(moba_write_grad_keys<decltype(element)>, shape, args); });
}

}  // namespace

int64_t moba_backward_workspace_bytes(const MobaBackwardParams& params, const CudaPlace&) {
  const MobaProblem& problem = params.problem;
  const bool is_deterministic = params.deterministic;
  if (count_units(problem) == 0 || (problem.query_len == 0 && problem.key_len == 0)) return 0;
  WorkspaceCutter cutter(nullptr);
  const WavePlan plan = plan_backward(problem, is_deterministic);
  prepare_geometry(problem, 1, cutter, nullptr);
  take_workspace(problem, is_deterministic, plan.units_per_wave, plan.queries_per_wave, cutter);
  return cutter.used();
}

void moba_backward_cuda(const MobaBackwardParams& params, const CudaWorkspace& given, const CudaPlace& place) {
  const MobaProblem& problem = params.problem;
  const bool is_deterministic = params.deterministic;
  const BackwardKernel& kernel = kernel_for(problem);
  if (count_units(problem) == 0 || (problem.query_len == 0 && problem.key_len == 0)) return;
  const DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const StageRange range("moba: backward");
  WorkspaceCutter cutter(given.data);
  const WavePlan plan = plan_backward(problem, is_deterministic);
  const MobaGeometry geometry = prepare_geometry(problem, 1, cutter, stream);
  const WorkspaceCutter wave_start = cutter;
  take_workspace(problem, is_deterministic, plan.units_per_wave, plan.queries_per_wave, cutter);
  require(cutter.used() <= given.bytes,
          "moba_backward: the workspace is smaller than moba_backward_workspace_bytes says");
  const int64_t key_elements = elements_of(problem.head_dim), value_elements = elements_of(problem.value_dim);
  for (int64_t wave_idx = 0; wave_idx < plan.num_waves(); ++wave_idx) {
    const Wave wave = plan.wave(problem, wave_idx);
    WorkspaceCutter wave_cutter = wave_start;
    const BackwardWorkspace workspace =
        take_workspace(problem, is_deterministic, wave.num_units, wave.num_queries, wave_cutter);
    if (wave.first_query == 0) {
      clear(workspace.grad_key, wave.num_units * problem.key_len * key_elements, stream);
      clear(workspace.grad_value, wave.num_units * problem.key_len * value_elements, stream);
    }
    if (wave.num_queries > 0) {
      build_block_lists({geometry, wave, params.block_indices, workspace.lists}, stream);
      RowArguments rows{};
      rows.geometry = geometry;
      rows.wave = wave;
      rows.num_rows = workspace.lists.num_rows;
      rows.head_dim = static_cast<int32_t>(problem.head_dim);
      rows.value_dim = static_cast<int32_t>(problem.value_dim);
      rows.key_elements = static_cast<int32_t>(key_elements);
      rows.is_deterministic = is_deterministic;
      rows.block_indices = params.block_indices;
      rows.out = params.out;
      rows.grad_out = params.grad_out;
      rows.grad_lse = params.grad_lse;
      rows.is_row_valid = workspace.lists.is_row_valid;
      rows.row_shift = workspace.row_shift;
      rows.sums = workspace.grad_query;
      rows.grad_query = params.grad_query;
      const cuda::LaunchShape row_shape{
          dim3(static_cast<unsigned>(divide_up(rows.num_rows, kRowWarps)), static_cast<unsigned>(wave.num_units)),
          dim3(kRowThreads), 0, stream};
      with_element(problem.dtype,
                   [&](auto element) { cuda::launch(moba_row_terms<decltype(element)>, row_shape, rows); });
      if (!is_deterministic) clear(workspace.grad_query, workspace.num_grad_query, stream);

      BackwardArguments args{};
      args.geometry = geometry;
      args.wave = wave;
      args.lists = workspace.lists;
      args.is_deterministic = is_deterministic;
      args.head_dim = rows.head_dim;
      args.value_dim = rows.value_dim;
      args.key_elements = rows.key_elements;
      args.value_elements = static_cast<int32_t>(value_elements);
      const auto scale = static_cast<float>(params.scale);
      args.score_scale = scale * backward::kLog2E;
      args.softcap = static_cast<float>(params.softcap) * backward::kLog2E;
      args.inverse_softcap = 1.0f / args.softcap;
      args.d_score_scale = std::abs(scale) > 1.0f ? scale : 1.0f;
      args.gradient_scale = std::abs(scale) > 1.0f ? 1.0f : scale;
      args.query = params.query;
      args.key = params.key;
      args.value = params.value;
      args.grad_out = params.grad_out;
      args.lse = params.lse;
      args.softmax_terms = params.softmax_terms;
      args.row_shift = workspace.row_shift;
      args.grad_query = workspace.grad_query;
      args.grad_key = workspace.grad_key;
      args.grad_value = workspace.grad_value;
      attend_backward(kernel, args, stream);
      with_element(problem.dtype,
                   [&](auto element) { cuda::launch(moba_write_grad_query<decltype(element)>, row_shape, rows); });
    }
    if (wave.first_query + wave.num_queries == problem.query_len) {
      const StageRange rounding("moba: gradients of keys");
      write_grad_keys(problem, geometry, wave.first_unit, wave.num_units, workspace.grad_key, params.grad_key,
                      problem.head_dim, stream);
      write_grad_keys(problem, geometry, wave.first_unit, wave.num_units, workspace.grad_value, params.grad_value,
                      problem.value_dim, stream);
    }
  }
}

void add_backward_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const Dtype dtype : kCudaDtypes) {
    with_element(dtype, [&](auto element) {
      for (const BackwardKernel& kernel : backward_kernels(element)) {
        facts.push_back(
            {"moba_attend_blocks_backward", kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.shared_bytes});
      }
    });
  }
}

}  // namespace topgather
