// Block attention forward on CUDA: waves, and the merging of a query's choices. moba_forward_cuda.cuh has the kernel
// that attends.
//
// Steps, per wave:
//   1. block lists (moba_layout_cuda.cu), of choices joined with the window where there is one (moba_window_cuda.cu);
//   2. moba_attend_blocks: a normalised partial output, its maximum and sum per choice;
//   3. moba_merge_slots: 8, 16 or 32 lanes take a query's row and combine its choices.
#include <algorithm>

#include "../common/softmax_terms.h"
#include "moba_forward_cuda.cuh"

namespace topgather {

namespace {

constexpr int kMergeWarps = 8;
constexpr int kMergeSlotsInFlight = 4;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace

struct MergeArguments {
  MobaGeometry geometry;
  Wave wave;
  int64_t num_rows;  // of a unit
  int32_t value_dim;
  int32_t partial_elements;
  Array<const int32_t, 4> block_indices;  // [batch, choice head, query, K] int32
  Array<const void, 1> sinks;             // [query head] float32, or data null
  const uint16_t* is_row_valid;           // [unit, row] uint16
  const void* partial_out;                // [unit, entry, partial_elements] dtype
  const float* partial_max;               // [unit, entry] float32, base 2
  const float* partial_sum;               // [unit, entry] float32
  Array<void, 4> out;                     // [batch, query head, query, V] dtype
  Array<void, 3> lse;                     // [batch, query head, query] float32
  Array<void, 4> softmax_terms;           // [batch, query head, query, 2] float32
  bool has_vector_rows;                   // whether rows of out are whole chunks of 16 bytes, on their boundaries
};

// What a choice adds to its row.
struct MergeSlot {
  bool is_seen;   // whether any key of it is visible; nothing was written for it otherwise
  float maximum;  // base 2
  float sum;
};

// kGroup lanes own a row. A lane takes a slot while weights are made, kGroup slots at a time, and kChunks chunks of 16
// bytes, a group's width apart, while they are applied, slot by slot in order, so that the sum is the same every time.
// A row without a visible key: out 0, lse -inf. One all of whose scores are -inf: NaN, as plain softmax. One whose
// choices are not valid: NaN.
template <typename Element, int kGroup, int kChunks>
__global__ void __launch_bounds__(kMergeWarps* cuda::kLanes, 1) moba_merge_slots(const MergeArguments args) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  constexpr int kRowsPerWarp = cuda::kLanes / kGroup;
  const MobaGeometry& geometry = args.geometry;
  const int lane = cuda::lane_id() % kGroup, group = cuda::lane_id() / kGroup;
  const int64_t wanted_row = (static_cast<int64_t>(blockIdx.x) * kMergeWarps + cuda::warp_id()) * kRowsPerWarp + group;
  const bool is_there = wanted_row < args.num_rows;
  const int64_t row = is_there ? wanted_row : args.num_rows - 1;  // lanes of other rows still need these lanes
  const Unit unit = unit_at(geometry, args.wave.first_unit + blockIdx.y);
  const WaveRow place = wave_row(geometry, args.wave, unit, row);
  const SequenceOnDevice sequence = sequence_of_query(geometry, place.query);
  const int32_t* choices = choices_of_query(geometry, args.block_indices, unit, place);
  const int64_t row_of_wave = blockIdx.y * args.num_rows + row;
  const int64_t first_entry = row_of_wave * geometry.top_k;
  const bool is_valid = args.is_row_valid[row_of_wave] != 0;
  const auto slot_at = [&](int slot) -> MergeSlot {
    if (!is_valid || slot >= geometry.top_k) return {false, -INFINITY, 0.0f};
    if (num_visible_keys(geometry, sequence, place.query, choices[slot]) <= 0) return {false, -INFINITY, 0.0f};
    return {true, args.partial_max[first_entry + slot], args.partial_sum[first_entry + slot]};
  };

  MergeSlot mine = slot_at(lane);
  float maximum = mine.maximum;
  bool sees_any = mine.is_seen;
  for (int slot = lane + kGroup; slot < geometry.top_k; slot += kGroup) {
    const MergeSlot other = slot_at(slot);
    maximum = cuda::max_or_nan(maximum, other.maximum);
    sees_any = sees_any || other.is_seen;
  }
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) {
    maximum = cuda::max_or_nan(maximum, __shfl_xor_sync(cuda::kAllLanes, maximum, distance));
  }
  const auto of_group = [&](unsigned lanes) {
    return kGroup == cuda::kLanes ? lanes : lanes >> (group * kGroup) & ((1u << (kGroup % cuda::kLanes)) - 1);
  };
  sees_any = of_group(__ballot_sync(cuda::kAllLanes, sees_any)) != 0;
  // Only scores of -inf: any finite base keeps -inf - base from being NaN.
  const float base = maximum == -INFINITY ? 0.0f : maximum;

  const auto* partials = static_cast<const Element*>(args.partial_out) + first_entry * args.partial_elements;
  float result[kChunks][kPerChunk] = {};
  float sum = 0.0f;
#pragma unroll 1
  for (int first = 0; first < geometry.top_k; first += kGroup) {
    if (first > 0) mine = slot_at(first + lane);
    const float weight_of_lane = mine.is_seen ? mine.sum * exp2f(mine.maximum - base) : 0.0f;
    const unsigned seen = of_group(__ballot_sync(cuda::kAllLanes, mine.is_seen));
    const int count = min(kGroup, geometry.top_k - first);
#pragma unroll 1
    for (int i = 0; i < count; i += kMergeSlotsInFlight) {
      uint4 words[kMergeSlotsInFlight][kChunks] = {};
#pragma unroll
      for (int j = 0; j < kMergeSlotsInFlight; ++j) {
        const Element* partial = partials + static_cast<int64_t>(first + i + j) * args.partial_elements;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int column = (c * kGroup + lane) * kPerChunk;
          if ((seen >> (i + j) & 1) != 0 && column < args.value_dim) {
            words[j][c] = *reinterpret_cast<const uint4*>(partial + column);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kMergeSlotsInFlight; ++j) {
        const float weight = __shfl_sync(cuda::kAllLanes, weight_of_lane, i + j, kGroup);
        sum += weight;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          float values[kPerChunk];
          cuda::unpack_chunk<Element>(words[j][c], values);
#pragma unroll
          for (int e = 0; e < kPerChunk; ++e) result[c][e] = fmaf(weight, values[e], result[c][e]);
        }
      }
    }
  }
  if (!is_there) return;  // no barrier follows
  float lse = fabsf(maximum) < INFINITY ? (maximum + log2f(sum)) * kLn2 : maximum;
  if (!sees_any) lse = is_valid ? -INFINITY : NAN;
  // Seen, but all at -inf: 0 / 0, unless a sink gives the sum something. Not seen: 0.
  const float share = cuda::share_beside_sink(lse, args.sinks, place.head);
  const bool is_zero = is_valid && (!sees_any || (lse == -INFINITY && cuda::has_sink(args.sinks, place.head)));
  const float factor = is_valid ? share / sum : NAN;
  Element* out = args.out.at<Element>(unit.batch_idx, place.head, place.query);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = (c * kGroup + lane) * kPerChunk;
    if (column >= args.value_dim) continue;
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e) result[c][e] = is_zero ? 0.0f : result[c][e] * factor;
    if (args.has_vector_rows) {
      *reinterpret_cast<uint4*>(out + column) = cuda::pack_chunk<Element>(result[c]);
    } else {
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) {
        if (column + e < args.value_dim) out[column + e] = cuda::from_float<Element>(result[c][e]);
      }
    }
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

template <typename Element, int kGroup, int kChunks>
void launch_merge(const MergeArguments& args, cudaStream_t stream) {
  constexpr int64_t kRowsPerBlock = int64_t{kMergeWarps} * cuda::kLanes / kGroup;
  cuda::launch(
      moba_merge_slots<Element, kGroup, kChunks>,
      {dim3(static_cast<unsigned>(divide_up(args.num_rows, kRowsPerBlock)), static_cast<unsigned>(args.wave.num_units)),
       dim3(kMergeWarps * cuda::kLanes), 0, stream},
      args);
}

void merge(Dtype dtype, const MergeArguments& args, cudaStream_t stream) {
  const StageRange range("moba.merge");
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    const int64_t num_chunks = divide_up(args.value_dim, 16 / static_cast<int64_t>(sizeof(Element)));
    if (num_chunks <= 8) {
      launch_merge<Element, 8, 1>(args, stream);
    } else if (num_chunks <= 16) {
      launch_merge<Element, 16, 1>(args, stream);
    } else if (num_chunks <= 32) {
      launch_merge<Element, 32, 1>(args, stream);
    } else {
      launch_merge<Element, 32, 2>(args, stream);
    }
  });
}

}  // namespace

int64_t moba_forward_workspace_bytes(const MobaForwardParams& params, const CudaPlace&) {
  const MobaProblem problem = problem_with_window(params.problem);
  if (problem.query_len == 0 || count_units(problem) == 0) return 0;
  WorkspaceCutter cutter(nullptr);
  const WavePlan plan = plan_forward(problem);
  const MobaGeometry geometry = prepare_geometry(problem, 1, cutter, nullptr);
  join_window(params.problem, geometry, params.block_indices, cutter, nullptr);
  take_workspace(problem, plan.units_per_wave, plan.queries_per_wave, cutter);
  return cutter.used();
}

void moba_forward_cuda(const MobaForwardParams& params, const CudaWorkspace& given, const CudaPlace& place) {
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
  const WorkspaceCutter wave_start = cutter;
  take_workspace(problem, plan.units_per_wave, plan.queries_per_wave, cutter);
  require(cutter.used() <= given.bytes,
          "moba_forward: the workspace is smaller than moba_forward_workspace_bytes says");
  for (int64_t wave_idx = 0; wave_idx < plan.num_waves(); ++wave_idx) {
    const Wave wave = plan.wave(problem, wave_idx);
    WorkspaceCutter wave_cutter = wave_start;
    const ForwardWorkspace workspace = take_workspace(problem, wave.num_units, wave.num_queries, wave_cutter);
    build_block_lists({geometry, wave, block_indices, workspace.lists}, stream);
    if (workspace.lists.max_items > 0) {
      const StageRange attention("moba.attend");
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
           static_cast<int32_t>(partial_elements_of(problem)), block_indices, params.sinks,
           workspace.lists.is_row_valid, workspace.partial_out, workspace.partial_max, workspace.partial_sum,
           params.out, params.lse, params.softmax_terms,
           params.out.has_aligned_rows(16) && problem.value_dim * element_bytes(problem.dtype) % 16 == 0},
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
