// Attention of new tokens to the blocks of a cache that they chose, on CUDA.
//
//   out_i = sum_t softmax_t(scale * dot(query_i, key_t)) value_t,   t over the keys of the chosen blocks up to i's own
//   lse_i = log sum_t exp(scale * dot(query_i, key_t))
//
// Bound by memory: every key and value row that a query sees is read once, 16 bytes a lane where rows are aligned; what
// is computed is little, so that plain multiply-adds do. Heads of a group choose different blocks, so that they share
// nothing but the cache. Two kernels.
// moba_decode_attend: a thread block owns one query and a split: some keys of one slot, or some slots. A window's blocks
// that the query did not choose have slots behind its own, the block before the last each time. Steps:
//   1. where each key of the split lies;
//   2. scores: a group of 8, 16 or 32 lanes takes a key, kRowsInFlight of them at a time;
//   3. their maximum, weights and sum;
//   4. weighted values: groups of lanes take rows in turn and add up their columns; the groups' sums are added in order
//      and go to the workspace, beside maximum and sum.
// moba_decode_merge: a thread block owns one query. Steps:
//   5. whether its choices may be: each a block of the sequence, none twice;
//   6. the splits' maximum, then their outputs and sums in order, weighted; out and lse.
// Numerics: float32 throughout, out rounded once. A key that is not seen is not read, so that it has no influence
// whatever it holds. A query that sees nothing gives out 0 and lse -inf; one whose lengths, pages or choices cannot be
// gives NaN; one that sees keys at -inf alone gives NaN, as softmax does. No ties.
// Determinism: how splits are cut depends on top_k and block_size alone: the same bits every time, and for a query
// whatever the others are.
#include <algorithm>

#include "../cuda/scores.cuh"
#include "../moba/moba_window.h"
#include "decode_config_cuda.h"
#include "decode_cuda.h"
#include "decode_pages_cuda.cuh"

namespace topgather {

namespace {
using Config = DecodeAttendCudaConfig;
constexpr int kThreads = Config::kThreads;
constexpr int kWarps = kThreads / kLanes;
constexpr int kRowsInFlight = Config::kRowsInFlight;
static_assert(kRowsInFlight == 4, "lanes' sums are added four at a time");
constexpr int kMaxPieces = 8;  // columns of a row that a lane holds
constexpr int kMergeThreads = Config::kMergeThreads;
constexpr int kMergeWarps = kMergeThreads / kLanes;
constexpr int kSplitsInFlight = Config::kSplitsInFlight;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
}  // namespace

// How the slots of a query are cut: several slots a split, or several splits a slot.
struct DecodeSplits {
  int32_t count;           // of a query
  int32_t per_slot;        // splits of a slot; 1 where a split has several
  int32_t slots;           // of a split; 1 where a slot has several
  int32_t keys_of_slot;    // that a split takes of each of its slots
  int32_t keys_per_split;  // slots * keys_of_slot
  int32_t num_slots;       // top_k, and those of the window
};

// What a split leaves beside its output.
struct DecodeSplitState {
  float maximum;  // of its scores times log2(e)
  float sum;      // of weights 2^(score - maximum), a maximum of -inf counting as 0; less than 0: saw no key
};

struct DecodeAttendArguments {
  DecodeGeometry geometry;
  DecodeWave wave;
  DecodeSplits splits;
  RowShape key_shape;
  RowShape value_shape;
  float score_scale;                      // scale * log2(e)
  float softcap;                          // softcap * log2(e); 0: scores stay
  Array<const void, 4> query;             // [batch, query head, M, D] dtype
  Array<const void, 4> key_pages;         // [page, kv head, page_size, D] dtype
  Array<const void, 4> value_pages;       // [page, kv head, page_size, V] dtype
  Array<const int32_t, 4> block_indices;  // [batch, choice head, M, K]
  DecodeSplitState* states;               // [unit of the wave, row, split]
  float* partial_out;  // [unit of the wave, row, split, V] float32; unwritten where the split saw no key
};

namespace {

struct AttendSharedMemory {
  float maximum[kWarps];
  float sum[kWarps];
  float columns[kMaxPieces][kThreads];
  // Behind it, of the split's keys: places [keys_per_split] CachePlace, scores and weights [keys_per_split] float32.
  static size_t bytes(int64_t keys_per_split) {
    return sizeof(AttendSharedMemory) + static_cast<size_t>(keys_per_split) * (sizeof(CachePlace) + 8);
  }
};

struct SplitKeys {
  CachePlace* places;
  float* scores;
  float* weights;
  int count;
};

// The block that is so many before the query's own, if the window has the block's key and it was not chosen, else -1.
__device__ __forceinline__ int32_t block_of_window(const DecodeGeometry& geometry, const DecodeRow& row,
                                                   const int32_t* choices, int32_t distance, int32_t key) {
  const int32_t block = row.own_block - distance;
  if (block < 0 || key <= row.position - geometry.window - block * geometry.block_size) return -1;
  for (int slot = 0; slot < geometry.top_k; ++slot) {
    if (choices[slot] == block) return -1;
  }
  return block;
}

// Step 1. False, to all threads, where the query sees no key of the split.
__device__ __forceinline__ bool find_keys(const DecodeAttendArguments& args, const DecodeRow& row, int split,
                                          const SplitKeys& keys) {
  const DecodeGeometry& geometry = args.geometry;
  const DecodeSplits& splits = args.splits;
  const int32_t* choices = choices_of_query(geometry, args.block_indices, row);
  const int first_slot = split / splits.per_slot * splits.slots;
  const int first_key = split % splits.per_slot * splits.keys_of_slot;
  bool sees_any = false;
  for (int i = threadIdx.x; i < keys.count; i += kThreads) {
    const int slot_in_split = i / splits.keys_of_slot;
    const int slot = first_slot + slot_in_split;
    const int key = first_key + i - slot_in_split * splits.keys_of_slot;
    CachePlace place{kNotSeen, 0};
    if (slot < splits.num_slots && key < geometry.block_size) {
      const int32_t block =
          slot < geometry.top_k ? choices[slot] : block_of_window(geometry, row, choices, slot - geometry.top_k, key);
      // Blocks up to the own one start at positions that exist.
      if (block >= 0 && block <= row.own_block && key <= row.position - block * geometry.block_size) {
        place = cache_place(geometry, row.sequence, block * geometry.block_size + key);
        sees_any = true;
      }
    }
    keys.places[i] = place;
  }
  // Publishes places, and whether there are any, to all warps.
  return __syncthreads_or(sees_any ? 1 : 0) != 0;
}

// Step 2.
template <typename Element, int kVector>
__device__ __forceinline__ void score_keys(const DecodeAttendArguments& args, const DecodeRow& row,
                                           const SplitKeys& keys) {
  using Columns = LaneColumns<Element, kVector>;
  const Element* query = args.query.at<Element>(row.sequence, row.head, row.token);
  const int lanes_per_row = args.key_shape.lanes_per_row;
  const int lane_in_row = lane_id() % lanes_per_row;
  const int group = static_cast<int>(threadIdx.x) / lanes_per_row, num_groups = kThreads / lanes_per_row;
#pragma unroll 1
  for (int step = 0; step < keys.count; step += kRowsInFlight * num_groups) {
    const Element* rows[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int key = step + r * num_groups + group;
      const CachePlace place = key < keys.count ? keys.places[key] : CachePlace{kNotSeen, 0};
      rows[r] = place.page >= 0 ? page_row<Element>(args.key_pages, row.kv_head, place) : nullptr;
    }
    float sums[kRowsInFlight] = {};
#pragma unroll 1
    for (int slab = 0; slab < args.key_shape.num_slabs; ++slab) {
      const Columns columns(args.key_shape, slab, lane_in_row);
      typename Columns::Part query_part, parts[kRowsInFlight];
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) columns.load(rows[r], rows[r] != nullptr, parts[r]);
      columns.load(query, true, query_part);
      float query_values[Columns::kCount];
      unpack(query_part, query_values);
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        float values[Columns::kCount];
        unpack(parts[r], values);
#pragma unroll
        for (int i = 0; i < Columns::kCount; ++i) sums[r] = fmaf(query_values[i], values[i], sums[r]);
      }
    }
    const float dot = sum_over_lanes(sums, lanes_per_row);
    const int key = step + lane_in_row * num_groups + group;
    if (lane_in_row < kRowsInFlight && key < keys.count) {
      const int32_t page = keys.places[key].page;
      float score = dot * args.score_scale;
      if (args.softcap > 0.0f) score = cuda::cap_score(score, args.softcap, 1.0f / args.softcap);
      keys.scores[key] = page >= 0 ? score : (page == kNoSuchPage ? not_a_number() : -INFINITY);
    }
  }
}

// Step 3. Leaves weights and the warps' sums in shared memory; every warp finds the maximum for itself.
__device__ __forceinline__ float weigh_keys(AttendSharedMemory& shared, const SplitKeys& keys) {
  float maximum = -INFINITY;
  for (int i = lane_id(); i < keys.count; i += kLanes) maximum = cuda::max_or_nan(maximum, keys.scores[i]);
  maximum = cuda::max_over_lanes(maximum);
  const float base = maximum == -INFINITY ? 0.0f : maximum;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < keys.count; i += kThreads) {
    const float weight = cuda::exp2_approximate(keys.scores[i] - base);
    keys.weights[i] = weight;
    sum += weight;
  }
  sum = cuda::sum_over_lanes(sum);
  if (lane_id() == 0) shared.sum[warp_id()] = sum;
  return maximum;
}

// Step 4.
template <typename Element, int kVector>
__device__ __forceinline__ void add_values(const DecodeAttendArguments& args, const DecodeRow& row,
                                           AttendSharedMemory& shared, const SplitKeys& keys, float* out) {
  using Columns = LaneColumns<Element, kVector>;
  static_assert(Columns::kCount <= kMaxPieces, "columns of a lane");
  const int lanes_per_row = args.value_shape.lanes_per_row;
  const int lane_in_row = lane_id() % lanes_per_row;
  const int group = static_cast<int>(threadIdx.x) / lanes_per_row, num_groups = kThreads / lanes_per_row;
#pragma unroll 1
  for (int slab = 0; slab < args.value_shape.num_slabs; ++slab) {
    const Columns columns(args.value_shape, slab, lane_in_row);
    float sums[Columns::kCount] = {};
#pragma unroll 1
    for (int step = group; step < keys.count; step += kRowsInFlight * num_groups) {
      typename Columns::Part parts[kRowsInFlight];
      float weights[kRowsInFlight];
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        const int key = step + r * num_groups;
        const CachePlace place = key < keys.count ? keys.places[key] : CachePlace{kNotSeen, 0};
        weights[r] = place.page != kNotSeen ? keys.weights[key] : 0.0f;
        if (place.page >= 0) columns.load(page_row<Element>(args.value_pages, row.kv_head, place), true, parts[r]);
      }
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        float values[Columns::kCount];
        unpack(parts[r], values);
#pragma unroll
        for (int i = 0; i < Columns::kCount; ++i) sums[i] = fmaf(weights[r], values[i], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < Columns::kCount; ++i) shared.columns[i][threadIdx.x] = sums[i];
    // Publishes the groups' sums to all threads.
    __syncthreads();
    for (int e = threadIdx.x; e < lanes_per_row * Columns::kCount; e += kThreads) {
      const int piece = e / lanes_per_row, lane = e - piece * lanes_per_row;
      const Columns of_lane(args.value_shape, slab, lane);
      const int column = of_lane.first + (kVector > 1 ? piece : piece * of_lane.step);
      float sum = 0.0f;
      for (int g = 0; g < num_groups; ++g) sum += shared.columns[piece][g * lanes_per_row + lane];
      if (column < args.geometry.value_dim) out[column] = sum;
    }
    // Tells all threads that the sums have been used and may be overwritten by the next slab's.
    __syncthreads();
  }
}

}  // namespace

template <typename Element, int kVector>
__global__ void __launch_bounds__(kThreads, Config::kBlocksPerProcessor)
    moba_decode_attend(const DecodeAttendArguments args) {
  AttendSharedMemory& shared = *reinterpret_cast<AttendSharedMemory*>(cuda::dynamic_shared_memory());
  const int num_keys = args.splits.keys_per_split;
  SplitKeys keys;
  keys.places = reinterpret_cast<CachePlace*>(&shared + 1);
  keys.scores = reinterpret_cast<float*>(keys.places + num_keys);
  keys.weights = keys.scores + num_keys;
  keys.count = num_keys;
  const uint32_t row_of_wave = blockIdx.x / static_cast<uint32_t>(args.splits.count);
  const int split = static_cast<int>(blockIdx.x - row_of_wave * static_cast<uint32_t>(args.splits.count));
  const DecodeRow row = decode_row(args.geometry, args.wave, row_of_wave);
  if (row.position < 0 || !find_keys(args, row, split, keys)) {
    if (threadIdx.x == 0) args.states[blockIdx.x] = {-INFINITY, -1.0f};
    return;  // the whole thread block
  }
  score_keys<Element, kVector>(args, row, keys);
  // Publishes scores to all warps.
  __syncthreads();
  const float maximum = weigh_keys(shared, keys);
  // Publishes weights and the warps' sums to all warps.
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sum[w];
    args.states[blockIdx.x] = {maximum, sum};
  }
  add_values<Element, kVector>(args, row, shared, keys,
                               args.partial_out + static_cast<int64_t>(blockIdx.x) * args.geometry.value_dim);
}

struct DecodeMergeArguments {
  DecodeGeometry geometry;
  DecodeWave wave;
  int32_t num_splits;
  Array<const int32_t, 4> block_indices;  // [batch, choice head, M, K]
  Array<const void, 1> sinks;             // [query head] float32, or data null
  const DecodeSplitState* states;         // [unit of the wave, row, split]
  const float* partial_out;               // [unit of the wave, row, split, V] float32
  Array<void, 4> out;                     // [batch, query head, M, V] dtype
  Array<void, 3> lse;                     // [batch, query head, M] float32
};

namespace {

struct MergeSharedMemory {
  float maximum[kMergeWarps];
  float weights[kMergeThreads];  // of some splits; less than 0: the split saw no key
  float sums[kMergeThreads];
};

// Step 5, the same answer to all threads. Choices mostly ascend, as the router leaves them: then none is there twice.
__device__ __forceinline__ bool are_choices_faulty(const DecodeRow& row, const int32_t* choices, int top_k) {
  bool is_faulty = false, is_unordered = false;
  for (int slot = threadIdx.x; slot < top_k; slot += kMergeThreads) {
    const int32_t block = choices[slot], before = choices[max(slot - 1, 0)];
    is_faulty = is_faulty || block < -1 || block >= row.num_blocks;
    is_unordered = is_unordered || (slot > 0 && block >= 0 && (before >= block || before < 0));
  }
  if (__syncthreads_or(is_unordered ? 1 : 0) != 0) {
    for (int slot = threadIdx.x; slot < top_k; slot += kMergeThreads) {
      const int32_t block = choices[slot];
      for (int other = 0; other < slot; ++other) is_faulty = is_faulty || (block >= 0 && choices[other] == block);
    }
  }
  return __syncthreads_or(is_faulty ? 1 : 0) != 0;
}

}  // namespace

template <typename Element>
__global__ void __launch_bounds__(kMergeThreads, 4) moba_decode_merge(const DecodeMergeArguments args) {
  MergeSharedMemory& shared = *reinterpret_cast<MergeSharedMemory*>(cuda::dynamic_shared_memory());
  const DecodeGeometry& geometry = args.geometry;
  const DecodeRow row = decode_row(geometry, args.wave, blockIdx.x);
  Element* out = args.out.at<Element>(row.sequence, row.head, row.token);
  float* lse = args.lse.at<float>(row.sequence, row.head, row.token);
  const int32_t* choices = choices_of_query(geometry, args.block_indices, row);
  const bool is_faulty = row.is_faulty || (row.position >= 0 && are_choices_faulty(row, choices, geometry.top_k));
  if (is_faulty || row.position < 0) {
    const float nothing = is_faulty ? not_a_number() : 0.0f;
    for (int column = threadIdx.x; column < geometry.value_dim; column += kMergeThreads) {
      out[column] = cuda::from_float<Element>(nothing);
    }
    if (threadIdx.x == 0) *lse = is_faulty ? nothing : -INFINITY;
    return;  // the whole thread block
  }

  // Step 6.
  const DecodeSplitState* states = args.states + static_cast<int64_t>(blockIdx.x) * args.num_splits;
  const float* partial_out = args.partial_out + static_cast<int64_t>(blockIdx.x) * args.num_splits * geometry.value_dim;
  float maximum = -INFINITY;
  for (int split = threadIdx.x; split < args.num_splits; split += kMergeThreads) {
    maximum = cuda::max_or_nan(maximum, states[split].maximum);
  }
  maximum = cuda::max_over_lanes(maximum);
  if (lane_id() == 0) shared.maximum[warp_id()] = maximum;
  // Publishes the warps' maxima to all.
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) maximum = cuda::max_or_nan(maximum, shared.maximum[w]);

  // Once at least, for lse, however narrow values are.
  int first_column = 0;
  do {
    const int column = first_column + static_cast<int>(threadIdx.x);
    const bool is_column = column < geometry.value_dim;
    float result = 0.0f, sum = 0.0f;
    bool sees_any = false;
    for (int first = 0; first < args.num_splits; first += kMergeThreads) {
      const int split = first + static_cast<int>(threadIdx.x);
      if (split < args.num_splits) {
        const DecodeSplitState state = states[split];
        const bool saw_none = state.sum < 0.0f;
        // A split of weights 0 alone adds what its values make of them.
        const float weight = state.maximum == -INFINITY ? 0.0f : exp2f(state.maximum - maximum);
        shared.weights[threadIdx.x] = saw_none ? -1.0f : weight;
        shared.sums[threadIdx.x] = state.sum;
      }
      // Publishes weights and sums to all threads.
      __syncthreads();
      const int count = min(kMergeThreads, args.num_splits - first);
#pragma unroll 1
      for (int some = 0; some < count; some += kSplitsInFlight) {
        // Their outputs are on their way together.
        float values[kSplitsInFlight];
#pragma unroll
        for (int i = 0; i < kSplitsInFlight; ++i) {
          const int s = some + i;
          values[i] = 0.0f;
          if (!is_column || s >= count || shared.weights[s] < 0.0f) continue;
          values[i] = partial_out[static_cast<int64_t>(first + s) * geometry.value_dim + column];
        }
#pragma unroll
        for (int i = 0; i < kSplitsInFlight; ++i) {
          const int s = some + i;
          if (s >= count || shared.weights[s] < 0.0f) continue;
          const float weight = shared.weights[s];
          sees_any = true;
          sum = fmaf(weight, shared.sums[s], sum);
          result = fmaf(weight, values[i], result);
        }
      }
      // Tells all threads that they have been used and may be overwritten.
      __syncthreads();
    }
    const float row_lse = sees_any && fabsf(maximum) < INFINITY ? (maximum + log2f(sum)) * kLn2 : maximum;
    // Seen, but all at -inf: 0 / 0, unless a sink gives the sum something.
    const bool is_zero = !sees_any || (row_lse == -INFINITY && cuda::has_sink(args.sinks, row.head));
    const float share = cuda::share_beside_sink(row_lse, args.sinks, row.head);
    if (is_column) out[column] = cuda::from_float<Element>(is_zero ? 0.0f : result / sum * share);
    if (column == 0) *lse = row_lse;
    first_column += kMergeThreads;
  } while (first_column < geometry.value_dim);
}

namespace {

DecodeSplits plan_splits(const DecodeProblem& problem) {
  const int64_t block_size = problem.block_size;
  const int64_t num_slots = problem.top_k + window_slots(problem.window, block_size);
  require(num_slots < INT32_MAX, "moba_decode: top_k and window have too many blocks for CUDA");
  // Without overflow: sizes fit 31 bits.
  const int64_t keys =
      std::clamp(divide_up(num_slots * block_size, Config::kMaxSplits), Config::kMinKeys, Config::kMaxKeys);
  DecodeSplits splits{};
  splits.num_slots = static_cast<int32_t>(num_slots);
  if (block_size > keys) {
    const int64_t per_slot = divide_up(block_size, keys), keys_of_slot = divide_up(block_size, per_slot);
    splits.per_slot = static_cast<int32_t>(per_slot);
    splits.slots = 1;
    splits.keys_of_slot = static_cast<int32_t>(keys_of_slot);
  } else {
    splits.per_slot = 1;
    splits.slots = static_cast<int32_t>(std::min(keys / block_size, num_slots));
    splits.keys_of_slot = static_cast<int32_t>(block_size);
  }
  const int64_t count = divide_up(num_slots, splits.slots) * splits.per_slot;
  require(count < INT32_MAX, "moba_decode: top_k * block_size is too large for CUDA");
  splits.count = static_cast<int32_t>(count);
  splits.keys_per_split = splits.slots * splits.keys_of_slot;
  return splits;
}

struct DecodePlan {
  DecodeGeometry geometry;
  DecodeSplits splits;
  DecodeWaves waves;
};

DecodePlan plan_decode(const DecodeProblem& problem) {
  DecodePlan plan{};
  plan.geometry = decode_geometry(problem);
  plan.splits = plan_splits(problem);
  const int64_t split_bytes = problem.value_dim * 4 + static_cast<int64_t>(sizeof(DecodeSplitState));
  plan.waves = plan_decode_waves(plan.geometry, plan.splits.count * split_bytes, Config::kBudget);
  return plan;
}

struct DecodeWorkspace {
  DecodeSplitState* states;
  float* partial_out;
};

DecodeWorkspace take_workspace(const DecodePlan& plan, WorkspaceCutter& cutter) {
  const int64_t splits = plan.waves.max_rows(plan.geometry) * plan.splits.count;
  DecodeWorkspace workspace{};
  workspace.states = cutter.take<DecodeSplitState>(splits);
  workspace.partial_out = cutter.take<float>(splits * plan.geometry.value_dim);
  return workspace;
}

template <typename Element, int kVector>
void launch_attend(DecodeAttendArguments args, cudaStream_t stream) {
  args.key_shape = row_shape<kVector>(args.geometry.head_dim);
  args.value_shape = row_shape<kVector>(args.geometry.value_dim);
  const int64_t items = int64_t{args.wave.num_units} * args.wave.num_rows * args.splits.count;
  require(items < INT32_MAX, "moba_decode: too many queries at once");
  cuda::launch(moba_decode_attend<Element, kVector>,
               {dim3(static_cast<unsigned>(items)), dim3(kThreads),
                AttendSharedMemory::bytes(args.splits.keys_per_split), stream},
               args);
}

template <typename Element>
void decode_for(const DecodeParams& params, const DecodePlan& plan, const DecodeWorkspace& workspace,
                cudaStream_t stream) {
  const DecodeProblem& problem = params.problem;
  const bool are_aligned =
      has_whole_pieces(params.query) && has_whole_pieces(params.key_pages) && has_whole_pieces(params.value_pages);
  for (int64_t wave_idx = 0; wave_idx < plan.waves.count(); ++wave_idx) {
    const DecodeWave wave = plan.waves.wave(plan.geometry, wave_idx);
    DecodeAttendArguments args{};
    args.geometry = plan.geometry;
    args.wave = wave;
    args.splits = plan.splits;
    args.score_scale = static_cast<float>(problem.scale) * kLog2E;
    args.softcap = static_cast<float>(params.softcap) * kLog2E;
    args.query = params.query;
    args.key_pages = params.key_pages;
    args.value_pages = params.value_pages;
    args.block_indices = params.block_indices;
    args.states = workspace.states;
    args.partial_out = workspace.partial_out;
    if (are_aligned) {
      launch_attend<Element, kElementsPerVector<Element>>(args, stream);
    } else {
      launch_attend<Element, 1>(args, stream);
    }
    cuda::launch(moba_decode_merge<Element>,
                 {dim3(static_cast<unsigned>(wave.num_units) * static_cast<unsigned>(wave.num_rows)),
                  dim3(kMergeThreads), sizeof(MergeSharedMemory), stream},
                 {plan.geometry, wave, plan.splits.count, params.block_indices, params.sinks, workspace.states,
                  workspace.partial_out, params.out, params.lse});
  }
}

}  // namespace

int64_t moba_decode_workspace_bytes(const DecodeParams& params, const CudaPlace&) {
  const DecodeProblem& problem = params.problem;
  if (is_empty(problem)) return 0;
  WorkspaceCutter cutter(nullptr);
  take_workspace(plan_decode(problem), cutter);
  return cutter.used();
}

void moba_decode_cuda(const DecodeParams& params, const CudaWorkspace& given, const CudaPlace& place) {
  const DecodeProblem& problem = params.problem;
  if (is_empty(problem)) return;
  const DeviceGuard guard(place.device);
  const StageRange range("decode.attend");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const DecodePlan plan = plan_decode(problem);
  WorkspaceCutter cutter(given.data);
  const DecodeWorkspace workspace = take_workspace(plan, cutter);
  require(cutter.used() <= given.bytes, "moba_decode: the workspace is smaller than moba_decode_workspace_bytes says");
  with_element(problem.dtype, [&](auto element) { decode_for<decltype(element)>(params, plan, workspace, stream); });
}

}  // namespace topgather
