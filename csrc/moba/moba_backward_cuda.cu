// Block attention backward on CUDA: waves, the sums it starts from and the rounding it ends with.
// moba_backward_cuda.cuh has the kernel that differentiates.
//
// Steps, per wave:
//   1. block lists (moba_layout_cuda.cu), of choices joined with the window where there is one (moba_window_cuda.cu);
//   2. moba_row_terms: some lanes take a query's row, shift = dot(grad_out, out) - grad_lse, and clear its sums;
//   3. in a unit's first wave, moba_clear_key_sums: a lane takes a key, its warp clears the sums that will be added to;
//   4. moba_attend_blocks_backward: float32 sums of grad_query; gradients of keys, or sums of them where several thread
//      blocks have a part;
//   5. moba_write_grad_query: a warp takes a query's row and rounds it, the deterministic way summing its slots in
//      order;
//   after a unit's last wave:
//   6. moba_write_grad_keys: a lane takes a key, its warp rounds what sums there are of its gradients.
#include <algorithm>
#include <cmath>

#include "../cuda/limits.h"
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
  bool has_vector_rows;  // whether rows of out and grad_out are whole chunks of 16 bytes, on their boundaries
  float d_score_scale;   // on row_shift
  float gradient_scale;  // on grad_query
  Array<const int32_t, 4> block_indices;  // [batch, choice head, query, K] int32
  Array<const void, 4> out;               // [batch, query head, query, V] dtype
  Array<const void, 4> grad_out;          // [batch, query head, query, V] dtype
  Array<const void, 3> grad_lse;          // [batch, query head, query] float32; data null when absent
  const uint16_t* is_row_valid;           // [unit, row] uint16
  float* row_shift;                       // [unit, row] float32
  float* sums;                // [unit, row, key_elements] float32; deterministic: [unit, entry, key_elements]
  Array<void, 4> grad_query;  // [batch, query head, query, D] dtype
};

// Lanes that share a row in step 2: a chunk of 16 bytes of 128 columns each.
constexpr int kRowLanes = 16;
constexpr int kRowsOfTerms = kRowThreads / kRowLanes;

// Step 2. Rows of workspaces are whole chunks of 16 bytes.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads, 1) moba_row_terms(const RowArguments args) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  const int lane = cuda::lane_id() % kRowLanes;
  const int64_t wanted_row = static_cast<int64_t>(blockIdx.x) * kRowsOfTerms + threadIdx.x / kRowLanes;
  const bool is_there = wanted_row < args.num_rows;
  const int64_t row = is_there ? wanted_row : args.num_rows - 1;  // lanes of other rows still need these lanes
  const Unit unit = unit_at(args.geometry, args.wave.first_unit + blockIdx.y);
  const WaveRow place = wave_row(args.geometry, args.wave, unit, row);
  const int64_t row_of_wave = blockIdx.y * args.num_rows + row;
  const Element* out = args.out.at<Element>(unit.batch_idx, place.head, place.query);
  const Element* grad_out = args.grad_out.at<Element>(unit.batch_idx, place.head, place.query);
  float sum = 0.0f;
  if (args.has_vector_rows) {
#pragma unroll 2
    for (int column = lane * kPerChunk; column < args.value_dim; column += kRowLanes * kPerChunk) {
      float left[kPerChunk], right[kPerChunk];
      cuda::unpack_chunk<Element>(*reinterpret_cast<const uint4*>(out + column), left);
      cuda::unpack_chunk<Element>(*reinterpret_cast<const uint4*>(grad_out + column), right);
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) sum = fmaf(left[i], right[i], sum);
    }
  } else {
    for (int column = lane; column < args.value_dim; column += kRowLanes) {
      sum = fmaf(cuda::to_float(out[column]), cuda::to_float(grad_out[column]), sum);
    }
  }
#pragma unroll
  for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(cuda::kAllLanes, sum, distance);
  }
  if (!is_there) return;  // no barrier follows
  if (!args.is_deterministic) {
    float* sums = args.sums + row_of_wave * args.key_elements;
    for (int column = lane * 4; column < args.key_elements; column += kRowLanes * 4) {
      *reinterpret_cast<float4*>(sums + column) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  if (lane != 0) return;
  if (args.grad_lse.data != nullptr) sum -= *args.grad_lse.at<float>(unit.batch_idx, place.head, place.query);
  args.row_shift[row_of_wave] = sum * args.d_score_scale;
}

// Step 5. A row whose choices are not valid: NaN.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads, 1) moba_write_grad_query(const RowArguments args) {
  const MobaGeometry& geometry = args.geometry;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + cuda::warp_id();
  if (row >= args.num_rows) return;  // whole warps, and no barrier follows
  const Unit unit = unit_at(geometry, args.wave.first_unit + blockIdx.y);
  const WaveRow place = wave_row(geometry, args.wave, unit, row);
  const SequenceOnDevice sequence = sequence_of_query(geometry, place.query);
  const int32_t* choices = choices_of_query(geometry, args.block_indices, unit, place);
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
    const float scale = args.gradient_scale;
    cuda::store_row_pair(grad_query, column, args.head_dim, sum.x * scale, sum.y * scale);
  }
}

// Sums of one of the two gradients of a key.
struct KeySums {
  int32_t num_columns;   // of a row of the gradient
  int32_t sum_elements;  // of a row of sums
  float scale;           // of the gradient
  float* sums;           // [unit, key, sum_elements] float32
  Array<void, 4> grad;   // [batch, kv head, key, num_columns] dtype
};

struct KeyRowArguments {
  MobaGeometry geometry;
  int64_t first_unit;
  const int32_t* list_starts;  // [unit, block + 1] int32, of the unit's only wave; null: every key has sums
  int32_t entries_per_item;
  KeySums key;
  KeySums value;
};

// Who writes a key's gradients.
enum class KeyOwner : uint8_t {
  kNobody,     // nobody chose its block
  kWorkItem,   // the one work item of its block's list
  kManyItems,  // sums are added to by several
};

__device__ __forceinline__ KeyOwner owner_of_key(const KeyRowArguments& args, int64_t key) {
  if (args.list_starts == nullptr) return KeyOwner::kManyItems;
  const MobaGeometry& geometry = args.geometry;
  int64_t sequence_idx = 0;
  if (geometry.is_packed()) sequence_idx = last_start_up_to(geometry.key_starts, geometry.num_sequences + 1, key);
  const SequenceOnDevice sequence = sequence_on_device(geometry, sequence_idx);
  if (!sequence.exists) return KeyOwner::kNobody;
  const uint32_t key_of_sequence = static_cast<uint32_t>(key - sequence.first_key);  // tokens number less than 2^31
  const int64_t block = sequence.first_block + key_of_sequence / static_cast<uint32_t>(geometry.block_size);
  const int32_t* starts = args.list_starts + blockIdx.y * (geometry.num_blocks + 1) + block;
  const int32_t num_entries = starts[1] - starts[0];
  if (num_entries == 0) return KeyOwner::kNobody;
  return num_entries <= args.entries_per_item ? KeyOwner::kWorkItem : KeyOwner::kManyItems;
}

// Keys of a thread block in steps 3 and 6: a lane finds each one's owner, then the warp takes those that have work.
constexpr int kKeysPerBlock = kRowThreads;

// Calls take_row(key, owner) with the whole warp for each of its keys that is not written by a work item.
template <typename TakeRow>
__device__ __forceinline__ void for_each_key_left(const KeyRowArguments& args, const TakeRow& take_row) {
  const int64_t first_key = static_cast<int64_t>(blockIdx.x) * kKeysPerBlock + cuda::warp_id() * cuda::kLanes;
  const int64_t key = first_key + cuda::lane_id();
  const bool is_there = key < args.geometry.key_len;
  const KeyOwner owner = is_there ? owner_of_key(args, key) : KeyOwner::kWorkItem;
  const unsigned with_sums = __ballot_sync(cuda::kAllLanes, owner == KeyOwner::kManyItems);
  unsigned left = with_sums | __ballot_sync(cuda::kAllLanes, owner == KeyOwner::kNobody);
#pragma unroll 1
  for (; left != 0; left &= left - 1) {
    const int lane = __ffs(static_cast<int>(left)) - 1;
    take_row(first_key + lane, (with_sums >> lane & 1) != 0 ? KeyOwner::kManyItems : KeyOwner::kNobody);
  }
}

// Step 3.
__global__ void __launch_bounds__(kRowThreads, 1) moba_clear_key_sums(const KeyRowArguments args) {
  for_each_key_left(args, [&](int64_t key, KeyOwner owner) {
    if (owner != KeyOwner::kManyItems) return;
    const auto clear_row = [&](const KeySums& of) {
      float* sums = of.sums + (blockIdx.y * args.geometry.key_len + key) * of.sum_elements;
      for (int column = cuda::lane_id() * 4; column < of.sum_elements; column += 4 * cuda::kLanes) {
        *reinterpret_cast<float4*>(sums + column) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    };
    clear_row(args.key);
    clear_row(args.value);
  });
}

// Step 6.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads, 1) moba_write_grad_keys(const KeyRowArguments args) {
  const Unit unit = unit_at(args.geometry, args.first_unit + blockIdx.y);
  for_each_key_left(args, [&](int64_t key, KeyOwner owner) {
    const bool are_sums = owner == KeyOwner::kManyItems;
    const auto write_row = [&](const KeySums& of) {
      const float* sums = of.sums + (blockIdx.y * args.geometry.key_len + key) * of.sum_elements;
      Element* grad = of.grad.at<Element>(unit.batch_idx, unit.kv_head, key);
      for (int column = cuda::lane_id() * 2; column < of.num_columns; column += 2 * cuda::kLanes) {
        const float2 sum = are_sums ? cuda::load_pair(sums + column) : make_float2(0.0f, 0.0f);
        cuda::store_row_pair(grad, column, of.num_columns, sum.x * of.scale, sum.y * of.scale);
      }
    };
    write_row(args.key);
    write_row(args.value);
  });
}

namespace {

// The first kernel that takes the problem's rows and blocks, and finds the shared memory it needs on this device.
const BackwardKernel& kernel_for(const MobaProblem& problem) {
  const int64_t num_columns = std::max(problem.head_dim, problem.value_dim);
  const auto max_bytes = static_cast<int64_t>(cuda::max_shared_bytes());
  return with_element(problem.dtype, [&](auto element) -> const BackwardKernel& {
    for (const BackwardKernel& kernel : backward_kernels(element)) {
      const bool takes = num_columns <= kernel.max_head_dim && problem.block_size >= kernel.min_block_size;
      if (takes && kernel.shared_bytes <= max_bytes) return kernel;
    }
    throw_rows_too_wide(num_columns);
  });
}

struct BackwardWorkspace {
  float* grad_key;    // [unit, key, key_elements] float32
  float* grad_value;  // [unit, key, value_elements] float32
  BlockListsOnDevice lists;
  float* row_shift;   // [unit, row] float32
  float* grad_query;  // [unit, row or entry, key_elements] float32
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
  const int64_t entries_per_item = is_deterministic ? INT32_MAX : kMobaBackwardEntriesPerItem;
  workspace.lists = take_lists(problem, num_units, num_queries, entries_per_item, cutter);
  const int64_t num_rows = num_units * workspace.lists.num_rows;
  workspace.row_shift = cutter.take<float>(num_rows);
  const int64_t sums_per_row = is_deterministic ? problem.top_k : 1;
  workspace.grad_query = cutter.take<float>(num_rows * sums_per_row * elements_of(problem.head_dim));
  return workspace;
}

// Step 4. The deterministic way takes the chunks of large blocks one after the other: each adds to the same rows.
void attend_backward(const BackwardKernel& kernel, BackwardArguments args, cudaStream_t stream) {
  if (args.lists.max_items == 0) return;
  const StageRange range("moba.attend_backward");
  const auto num_chunks = static_cast<int32_t>(divide_up(args.geometry.block_size, kernel.keys_per_chunk));
  const auto needed = static_cast<int32_t>(divide_up(args.geometry.key_len, kernel.keys_per_chunk));
  args.num_chunks = std::min(num_chunks, needed);
  if (!args.is_deterministic) return kernel.launch(args, stream);
  const int32_t last = args.num_chunks;
  args.num_chunks = 1;
  for (args.first_chunk = 0; args.first_chunk < last; ++args.first_chunk) kernel.launch(args, stream);
}

cuda::LaunchShape key_rows(const MobaProblem& problem, int64_t num_units, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(divide_up(problem.key_len, kKeysPerBlock)), static_cast<unsigned>(num_units)),
          dim3(kRowThreads), 0, stream};
}

// Whether a work item may store four neighbours of a row at once.
bool has_rows_of_fours(const Array<void, 4>& grad, int64_t dim, int64_t element_size) {
  return dim % 4 == 0 && grad.has_aligned_rows(4 * element_size);
}

}  // namespace

int64_t moba_backward_workspace_bytes(const MobaBackwardParams& params, const CudaPlace&) {
  const MobaProblem problem = problem_with_window(params.problem);
  const bool is_deterministic = params.deterministic;
  if (count_units(problem) == 0 || (problem.query_len == 0 && problem.key_len == 0)) return 0;
  WorkspaceCutter cutter(nullptr);
  const WavePlan plan = plan_backward(problem, is_deterministic);
  const MobaGeometry geometry = prepare_geometry(problem, 1, cutter, nullptr);
  join_window(params.problem, geometry, params.block_indices, cutter, nullptr);
  take_workspace(problem, is_deterministic, plan.units_per_wave, plan.queries_per_wave, cutter);
  return cutter.used();
}

void moba_backward_cuda(const MobaBackwardParams& params, const CudaWorkspace& given, const CudaPlace& place) {
  const MobaProblem problem = problem_with_window(params.problem);
  const bool is_deterministic = params.deterministic;
  const DeviceGuard guard(place.device);
  const BackwardKernel& kernel = kernel_for(problem);
  if (count_units(problem) == 0 || (problem.query_len == 0 && problem.key_len == 0)) return;
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const StageRange range("moba.backward");
  WorkspaceCutter cutter(given.data);
  const WavePlan plan = plan_backward(problem, is_deterministic);
  const MobaGeometry geometry = prepare_geometry(problem, 1, cutter, stream);
  const Array<const int32_t, 4> block_indices =
      join_window(params.problem, geometry, params.block_indices, cutter, stream);
  const WorkspaceCutter wave_start = cutter;
  take_workspace(problem, is_deterministic, plan.units_per_wave, plan.queries_per_wave, cutter);
  require(cutter.used() <= given.bytes,
          "moba_backward: the workspace is smaller than moba_backward_workspace_bytes says");
  const int64_t element_size = element_bytes(problem.dtype);
  const auto scale = static_cast<float>(params.scale);
  RowArguments rows{};
  rows.geometry = geometry;
  rows.head_dim = static_cast<int32_t>(problem.head_dim);
  rows.value_dim = static_cast<int32_t>(problem.value_dim);
  rows.key_elements = static_cast<int32_t>(elements_of(problem.head_dim));
  rows.is_deterministic = is_deterministic;
  rows.has_vector_rows = problem.value_dim * element_size % 16 == 0 && params.out.has_aligned_rows(16) &&
                         params.grad_out.has_aligned_rows(16);
  rows.d_score_scale = std::abs(scale) > 1.0f ? scale : 1.0f;
  rows.gradient_scale = std::abs(scale) > 1.0f ? 1.0f : scale;
  rows.block_indices = block_indices;
  rows.out = params.out;
  rows.grad_out = params.grad_out;
  rows.grad_lse = params.grad_lse;
  rows.grad_query = params.grad_query;

  BackwardArguments args{};
  args.geometry = geometry;
  args.is_deterministic = is_deterministic;
  args.head_dim = rows.head_dim;
  args.value_dim = rows.value_dim;
  args.key_elements = rows.key_elements;
  args.value_elements = static_cast<int32_t>(elements_of(problem.value_dim));
  args.score_scale = scale * backward::kLog2E;
  args.softcap = static_cast<float>(params.softcap) * backward::kLog2E;
  args.inverse_softcap = 1.0f / args.softcap;
  args.d_score_scale = rows.d_score_scale;
  args.gradient_scale = rows.gradient_scale;
  args.query = params.query;
  args.key = params.key;
  args.value = params.value;
  args.grad_out = params.grad_out;
  args.lse = params.lse;
  args.softmax_terms = params.softmax_terms;
  args.grad_key = params.grad_key;
  args.grad_value = params.grad_value;

  KeyRowArguments keys{};
  keys.geometry = geometry;
  keys.key = {args.head_dim, args.key_elements, args.gradient_scale, nullptr, params.grad_key};
  keys.value = {args.value_dim, args.value_elements, 1.0f, nullptr, params.grad_value};
  for (int64_t wave_idx = 0; wave_idx < plan.num_waves(); ++wave_idx) {
    const Wave wave = plan.wave(problem, wave_idx);
    WorkspaceCutter wave_cutter = wave_start;
    const BackwardWorkspace workspace =
        take_workspace(problem, is_deterministic, wave.num_units, wave.num_queries, wave_cutter);
    // The gradients of a list that is one item are whole where no other wave has some of the unit's queries.
    args.writes_keys = wave.num_queries == problem.query_len && wave.num_queries > 0 &&
                       has_rows_of_fours(params.grad_key, problem.head_dim, element_size) &&
                       has_rows_of_fours(params.grad_value, problem.value_dim, element_size);
    keys.first_unit = wave.first_unit;
    keys.list_starts = args.writes_keys ? workspace.lists.list_starts : nullptr;
    keys.entries_per_item = workspace.lists.entries_per_item;
    keys.key.sums = args.grad_key_sums = workspace.grad_key;
    keys.value.sums = args.grad_value_sums = workspace.grad_value;
    if (wave.num_queries > 0) build_block_lists({geometry, wave, block_indices, workspace.lists}, stream);
    if (wave.first_query == 0 && problem.key_len > 0) {
      cuda::launch(moba_clear_key_sums, key_rows(problem, wave.num_units, stream), keys);
    }
    if (wave.num_queries > 0) {
      rows.wave = wave;
      rows.num_rows = workspace.lists.num_rows;
      rows.is_row_valid = workspace.lists.is_row_valid;
      rows.row_shift = workspace.row_shift;
      rows.sums = workspace.grad_query;
      const auto row_shape = [&](int64_t rows_per_block) -> cuda::LaunchShape {
        return {dim3(static_cast<unsigned>(divide_up(rows.num_rows, rows_per_block)),
                     static_cast<unsigned>(wave.num_units)),
                dim3(kRowThreads), 0, stream};
      };
      with_element(problem.dtype, [&](auto element) {
        cuda::launch(moba_row_terms<decltype(element)>, row_shape(kRowsOfTerms), rows);
      });
      args.wave = wave;
      args.lists = workspace.lists;
      args.row_shift = workspace.row_shift;
      args.grad_query_sums = workspace.grad_query;
      attend_backward(kernel, args, stream);
      with_element(problem.dtype, [&](auto element) {
        cuda::launch(moba_write_grad_query<decltype(element)>, row_shape(kRowWarps), rows);
      });
    }
    if (wave.first_query + wave.num_queries == problem.query_len && problem.key_len > 0) {
      const StageRange rounding("moba.key_gradients");
      with_element(problem.dtype, [&](auto element) {
        cuda::launch(moba_write_grad_keys<decltype(element)>, key_rows(problem, wave.num_units, stream), keys);
      });
    }
  }
}

void add_backward_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const Dtype dtype : kCudaDtypes) {
    with_element(dtype, [&](auto element) {
      for (const BackwardKernel& kernel : backward_kernels(element)) {
        const char* name =
            kernel.min_block_size > 0 ? "moba_attend_blocks_backward, block_size > 64" : "moba_attend_blocks_backward";
        facts.push_back({name, kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.shared_bytes});
      }
    });
  }
}

}  // namespace topgather
