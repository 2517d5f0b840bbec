// Steps of an optimizer on the rows of a table that entries name, on CUDA: no gradient of a row outlives its step, and
// nothing waits for the device. memory_update_cpu.h has the formulas.
//
// Entries are sorted by row and cut into pieces, as for the gradient of a table (memory_backward_cuda.cu). Who owns what: a
// thread a sorted entry in step 1; then a group of 8, 16 or 32 lanes a piece and a slab of columns, whose rows nobody else
// writes but for the runs that go on in other pieces. Steps, a kernel each:
//   1. memory_update_gather: brings an entry's row, token and weight together. The first one of a run counts the row's step
//      and leaves what that step multiplies with, in float64 up to there;
//   2. memory_update_pieces: walks a piece in order, sums the entries of a run in registers and steps the row: value and
//      states read and written once. What goes on in another piece goes to head and tail sums;
//   3. memory_backward_stretches, as there;
//   4. memory_update_runs: the piece in which a long run begins adds its sums up and steps the row.
// Where squares are asked for, 2. and 4. add up those of the rows' sums in place of steps, one number a thread block, and
//   5. memory_update_squares: adds these up, in order.
// Memory: for each run its row of values and states, read and written; for each entry 2 W bytes of grad_out (16-bit
// types), which stays in the second-level cache while T W does, and 36 bytes; 32 for each run and slab.
// Numerics: as on the CPU, by the same random bits; sums are taken in the order of pieces.
// Determinism: a row depends on its own entries and their sorted positions.
#include <cmath>

#include "../cuda/dispatch.h"
#include "../cuda/rounding.h"
#include "memory_cuda.h"
#include "memory_row_bits.h"
#include "memory_runs_cuda.cuh"

namespace topgather {

// What a row's step multiplies with: two loads of 16 bytes.
struct alignas(16) RowStep {
  float decay;
  float rate;
  float root;  // of Adam: 1 / sqrt(1 - beta2^t)
  int32_t is_first;
  uint32_t bits_of_states;
  uint32_t bits_of_values;
  uint32_t unused[2];
};

// A state of the rows, or none.
struct RowState {
  void* data;
  int64_t stride;
  bool is_bfloat16;
};

struct MemoryUpdateArguments : MemoryRunArguments {
  RowAlgorithm algorithm;
  void* values;  // [num_rows, W] dtype
  int64_t values_stride;
  RowState first;
  RowState second;
  int32_t* steps;  // [num_rows]
  int64_t steps_stride;
  double* decayed;  // [num_rows], or null
  int64_t decayed_stride;
  RowStep* row_steps;  // [num_entries], by target
  double* squares;     // of the thread blocks of pieces, then of those of long runs; null: rows are stepped
  double* total;
  int64_t num_piece_squares;
  int64_t num_squares;
  double learning_rate, first_beta, second_beta, total_decay;
  uint64_t bits;  // of the step
  float scale, weight_decay, eps, first_rate, new_first, second_rate, new_second;
  bool is_nesterov;
  bool is_stochastic;
};

namespace {

constexpr int kEntriesAhead = kEntriesInFlight + 1;
constexpr size_t kSquareBytes = kThreads * sizeof(double);

__device__ __forceinline__ RowStep load_step(const RowStep* step) {
  const uint4 low = reinterpret_cast<const uint4*>(step)[0], high = reinterpret_cast<const uint4*>(step)[1];
  return {__uint_as_float(low.x),
          __uint_as_float(low.y),
          __uint_as_float(low.z),
          static_cast<int32_t>(low.w),
          high.x,
          high.y,
          {0u, 0u}};
}

// float32 as bfloat16, up with the share of 2^16 that `bits` are: 16 random ones.
__device__ __forceinline__ uint32_t bfloat16_by(float number, uint32_t bits) {
  const uint32_t whole = __float_as_uint(number);
  if ((whole & 0x7f800000u) == 0x7f800000u) return cuda::from_float<BFloat16>(number).bits;
  return (whole + bits) >> 16;
}

// The columns of a row that a lane steps: kCount from `first` on, a vector, or `step` apart.
template <int kCountOfLane, bool kIsVector>
struct StepColumns {
  static constexpr int kCount = kCountOfLane;
  int first;
  int step;
  int row_dim;

  __device__ __forceinline__ int column(int i) const { return kIsVector ? first + i : first + i * step; }
  __device__ __forceinline__ bool has(int i) const { return column(i) < row_dim; }

  template <typename Stored>
  __device__ __forceinline__ void load(const Stored* row, float (&numbers)[kCount]) const {
    if constexpr (!kIsVector) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) numbers[i] = has(i) ? cuda::to_float(row[column(i)]) : 0.0f;
    } else if constexpr (sizeof(Stored) == 4) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(row + first + i);
        numbers[i] = four.x, numbers[i + 1] = four.y, numbers[i + 2] = four.z, numbers[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint2 words = *reinterpret_cast<const uint2*>(row + first + i);
        const float2 low = cuda::unpack2<Stored>(words.x), high = cuda::unpack2<Stored>(words.y);
        numbers[i] = low.x, numbers[i + 1] = low.y, numbers[i + 2] = high.x, numbers[i + 3] = high.y;
      }
    }
  }

  // `row_bits`, of which each column's are made, from bit `shift` on, if rounding is random.
  template <typename Stored>
  __device__ __forceinline__ void store(Stored* row, const float (&numbers)[kCount], bool is_stochastic,
                                        uint32_t row_bits, int shift) const {
    uint32_t words[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (sizeof(Stored) == 4) {
        words[i] = __float_as_uint(numbers[i]);
      } else {
        words[i] = cuda::from_float<Stored>(numbers[i]).bits;
        if constexpr (std::is_same_v<Stored, BFloat16>) {
          const uint32_t bits = column_bits(row_bits, static_cast<uint32_t>(column(i))) >> shift & 0xffffu;
          if (is_stochastic) words[i] = bfloat16_by(numbers[i], bits);
        }
      }
    }
    if constexpr (!kIsVector) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!has(i)) continue;
        if constexpr (sizeof(Stored) == 4) {
          row[column(i)] = numbers[i];
        } else {
          row[column(i)] = Stored{static_cast<uint16_t>(words[i])};
        }
      }
    } else if constexpr (sizeof(Stored) == 4) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        *reinterpret_cast<uint4*>(row + first + i) = {words[i], words[i + 1], words[i + 2], words[i + 3]};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        *reinterpret_cast<uint2*>(row + first + i) = {words[i] | words[i + 1] << 16, words[i + 2] | words[i + 3] << 16};
      }
    }
  }

  __device__ __forceinline__ void load(const RowState& state, int64_t row, float (&numbers)[kCount]) const {
    if (state.is_bfloat16) {
      load(static_cast<const BFloat16*>(state.data) + row * state.stride, numbers);
    } else {
      load(static_cast<const float*>(state.data) + row * state.stride, numbers);
    }
  }
  __device__ __forceinline__ void store(const RowState& state, int64_t row, const float (&numbers)[kCount],
                                        bool is_stochastic, uint32_t row_bits, int shift) const {
    if (state.is_bfloat16) {
      store(static_cast<BFloat16*>(state.data) + row * state.stride, numbers, is_stochastic, row_bits, shift);
    } else {
      store(static_cast<float*>(state.data) + row * state.stride, numbers, false, 0, 0);
    }
  }
};

// Steps a lane's columns of a row, or adds their squares to `squares`.
template <typename Element, typename Columns>
__device__ __forceinline__ void step_row(const MemoryUpdateArguments& args, const Columns& columns, int32_t row,
                                         int32_t target, const float (&sums)[Columns::kCount], double& squares) {
  constexpr int kCount = Columns::kCount;
  if (args.squares != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (columns.has(i)) squares += static_cast<double>(sums[i]) * static_cast<double>(sums[i]);
    }
    return;
  }
  if (!columns.has(0)) return;
  const RowStep step = load_step(args.row_steps + target);
  Element* row_values = static_cast<Element*>(args.values) + row * args.values_stride;
  float values[kCount], first[kCount], second[kCount], grads[kCount];
  columns.load(row_values, values);
  if (args.first.data != nullptr) columns.load(args.first, row, first);
  if (args.second.data != nullptr) columns.load(args.second, row, second);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] *= step.decay;
    grads[i] = sums[i] * args.scale + values[i] * args.weight_decay;
  }
  if (args.algorithm == RowAlgorithm::kSgd) {
    if (args.first.data == nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] -= step.rate * grads[i];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        first[i] = step.is_first != 0 ? grads[i] : first[i] * args.first_rate + grads[i] * args.new_first;
        values[i] -= step.rate * (args.is_nesterov ? grads[i] + first[i] * args.first_rate : first[i]);
      }
    }
  } else if (args.algorithm == RowAlgorithm::kAdagrad) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      first[i] += grads[i] * grads[i];
      values[i] -= step.rate * grads[i] / (sqrtf(first[i]) + args.eps);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      first[i] += (grads[i] - first[i]) * args.new_first;
      second[i] = second[i] * args.second_rate + grads[i] * grads[i] * args.new_second;
      values[i] -= step.rate * first[i] / (sqrtf(second[i]) * step.root + args.eps);
    }
    columns.store(args.second, row, second, args.is_stochastic, step.bits_of_states, 16);
  }
  if (args.first.data != nullptr) {
    columns.store(args.first, row, first, args.is_stochastic, step.bits_of_states, 0);
  }
  columns.store(row_values, values, args.is_stochastic, step.bits_of_values, 0);
}

// Adds the squares of a thread block's threads up, in order, to `place`. Takes memory for a number a thread.
__device__ __forceinline__ void add_squares(double squares, double* place) {
  double* sums = reinterpret_cast<double*>(cuda::dynamic_shared_memory());
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  sums[thread] = squares;
  // Publishes every thread's squares to the first warp.
  __syncthreads();
  if (thread < kLanes) {
    for (int other = thread + kLanes; other < num_threads; other += kLanes) squares += sums[other];
    sums[thread] = squares;
  }
  // Publishes the sums of the first warp's lanes to the first thread.
  __syncthreads();
  if (thread != 0) return;
  for (int lane = 1; lane < kLanes; ++lane) squares += sums[lane];
  *place = squares;
}

// One slab of a piece.
template <typename Element, int kVector>
__device__ __forceinline__ void step_piece(const MemoryUpdateArguments& args, const Piece& piece, int slab,
                                           double& squares) {
  using Columns = LaneColumns<Element, kVector>;
  constexpr int kCount = Columns::kCount;
  const Columns columns(args.shape, slab, lane_id() % args.shape.lanes_per_row);
  const StepColumns<kCount, (kVector > 1)> own = {columns.first, columns.step, columns.row_dim};
  const Element* grad_out = static_cast<const Element*>(args.grad_out);
  const SortedEntry* entries = args.entries + piece.first;
  // Rows of grad_out under way, and the entry whose row is asked for next.
  SortedEntry under_way[kEntriesInFlight], next;
  typename Columns::Part parts[kEntriesInFlight];
#pragma unroll
  for (int i = 0; i < kEntriesInFlight; ++i) {
    under_way[i] = load_entry(entries + i);
    columns.load_any(grad_out, static_cast<uint32_t>(under_way[i].token), args.grad_out_stride, parts[i]);
  }
  next = load_entry(entries + kEntriesInFlight);
  float sums[kCount] = {};
  int32_t run_row = kNoRow, run_target = 0;
  // One entry a turn, so that the step stands in the code once; the last turn ends the last run.
#pragma unroll 1
  for (int e = 0; e <= kEntriesPerPiece; ++e) {
    const SortedEntry entry = under_way[0];
    const bool is_new_row = entry.row != run_row || e == kEntriesPerPiece;
    if (is_new_row && run_row != kNoRow) {
      float* sum = nullptr;
      if (run_row == piece.row_after) sum = tail_sum(args, piece.idx);
      if (run_row == piece.row_before) sum = head_sum(args, piece.idx);  // though it may go on in the next piece
      if (sum != nullptr) {
        columns.store_float32(sum, sums);
      } else {
        step_row<Element>(args, own, run_row, run_target, sums, squares);
      }
    }
    if (e == kEntriesPerPiece) break;
    run_row = entry.row;
    run_target = entry.target;
    float grad[kCount];
    unpack(parts[0], grad);
#pragma unroll
    for (int c = 0; c < kCount; ++c) sums[c] = fmaf(entry.weight, grad[c], is_new_row ? 0.0f : sums[c]);
#pragma unroll
    for (int i = 0; i + 1 < kEntriesInFlight; ++i) {
      under_way[i] = under_way[i + 1];
      parts[i] = parts[i + 1];
    }
    under_way[kEntriesInFlight - 1] = next;
    columns.load_any(grad_out, static_cast<uint32_t>(next.token), args.grad_out_stride, parts[kEntriesInFlight - 1]);
    next = load_entry(entries + e + 1 + kEntriesInFlight);
  }
}

}  // namespace

// Step 1.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_update_gather(const MemoryUpdateArguments args) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (position >= args.num_padded_entries) return;
  const SortedEntry entry = gather_entry(args, position);
  store_entry(args.entries + position, entry);
  if (entry.row == kNoRow || row_at(args, position - 1) == entry.row || args.squares != nullptr) return;
  int32_t& steps = args.steps[entry.row * args.steps_stride];
  const int64_t step = static_cast<int64_t>(steps) + 1;
  steps = static_cast<int32_t>(step < INT32_MAX ? step : INT32_MAX);
  RowStep row_step = {1.0f, 0.0f, 1.0f, step == 1 ? 1 : 0, 0u, 0u, {0u, 0u}};
  if (args.decayed != nullptr) {
    double& decayed = args.decayed[entry.row * args.decayed_stride];
    row_step.decay = static_cast<float>(exp(args.total_decay - decayed));
    decayed = args.total_decay;
  }
  double rate = args.learning_rate;
  if (args.algorithm == RowAlgorithm::kAdagrad) rate /= 1.0 + static_cast<double>(step - 1) * args.second_beta;
  if (args.algorithm == RowAlgorithm::kAdam) {
    rate /= 1.0 - whole_power(args.first_beta, step);
    row_step.root = static_cast<float>(1.0 / sqrt(1.0 - whole_power(args.second_beta, step)));
  }
  row_step.rate = static_cast<float>(rate);
  const uint64_t bits = mix_bits(args.bits + static_cast<uint64_t>(entry.row));
  auto* words = reinterpret_cast<uint4*>(args.row_steps + entry.target);
  words[0] = {__float_as_uint(row_step.decay), __float_as_uint(row_step.rate), __float_as_uint(row_step.root),
              static_cast<uint32_t>(row_step.is_first)};
  words[1] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), 0u, 0u};
}

// Step 2.
template <typename Element, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_update_pieces(const MemoryUpdateArguments args) {
  const int lanes_per_row = args.shape.lanes_per_row;
  const int groups = kLanes / lanes_per_row;
  const int warps_per_piece = args.warps_per_piece;
  const int pieces_abreast = static_cast<int>(blockDim.x) / kLanes / warps_per_piece;  // warps with a piece a group
  Piece piece;
  piece.idx = static_cast<int32_t>(blockIdx.x) * pieces_abreast * groups + warp_id() / warps_per_piece * groups +
              lane_id() / lanes_per_row;
  piece.first = static_cast<int64_t>(piece.idx) * kEntriesPerPiece;
  piece.row_before = row_at(args, piece.first - 1);
  piece.row_after = row_at(args, piece.first + kEntriesPerPiece);
  double squares = 0.0;
  for (int slab = warp_id() % warps_per_piece; slab < args.shape.num_slabs; slab += warps_per_piece) {
    step_piece<Element, kVector>(args, piece, slab, squares);
  }
  if (args.squares != nullptr) add_squares(squares, args.squares + blockIdx.x);
}

// Step 4.
template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) memory_update_runs(const MemoryUpdateArguments args) {
  const SumTask task = sum_task(args, blockIdx.x * kMaxWarps + static_cast<uint32_t>(warp_id()));
  const LongRun run = long_run_of(args, task);
  double squares = 0.0;
  if (run.row != kNoRow) {  // whole warps
    float totals[kSumColumns] = {};
    sum_long_run(args, task, run.row, totals);
    const StepColumns<kSumColumns, false> own = {task.first_column, kLanes, args.shape.row_dim};
    step_row<Element>(args, own, run.row, args.targets[run.last_entry], totals, squares);
  }
  if (args.squares != nullptr) add_squares(squares, args.squares + args.num_piece_squares + blockIdx.x);
}

// Step 5.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_update_squares(const MemoryUpdateArguments args) {
  double squares = 0.0;
  for (int64_t i = threadIdx.x; i < args.num_squares; i += kThreads) squares += args.squares[i];
  add_squares(squares, args.total);
}

namespace {

template <typename Element>
bool has_vector_states(const InOutArray<void, 2>& state) {
  constexpr int64_t kCount = kElementsPerVector<Element>;
  // bfloat16 is loaded four columns at a time, float32 too.
  return state.data == nullptr ||
         (state.sizes[1] % kCount == 0 && state.has_aligned_rows(4 * element_bytes(state.dtype)));
}

template <typename Element>
bool has_vectors(const MemoryUpdateParams& params) {
  return has_vector_rows<Element>(params.values) && has_vector_rows<Element>(params.grad_out) &&
         has_vector_states<Element>(params.first) && has_vector_states<Element>(params.second);
}

template <typename Element>
RowShape shape_for(const MemoryUpdateParams& params) {
  return has_vectors<Element>(params) ? row_shape<kElementsPerVector<Element>>(params.problem.row_dim)
                                      : row_shape<1>(params.problem.row_dim);
}

// How pieces are shared out among thread blocks.
struct PieceLaunch {
  int warps_per_piece;
  int num_warps;  // of a block
  int64_t num_blocks;
};

PieceLaunch piece_launch(const MemoryProblem& problem, const RowShape& shape) {
  const int warps_per_piece = shape.num_slabs < kMaxWarps ? shape.num_slabs : kMaxWarps;
  const int pieces_abreast = kMaxWarps / warps_per_piece;
  const int64_t pieces = int64_t{pieces_abreast} * (kLanes / shape.lanes_per_row);
  return {warps_per_piece, pieces_abreast * warps_per_piece, divide_up(num_pieces_of(problem), pieces)};
}

int64_t num_run_blocks(const MemoryProblem& problem) {
  const int64_t num_runs = num_pieces_of(problem) - 1;
  return num_runs == 0 ? 0 : static_cast<int64_t>(shape_of_sums(num_runs, problem.row_dim, nullptr).grid.x);
}

int64_t round_up_16(int64_t bytes) { return divide_up(bytes, int64_t{16}) * 16; }

template <typename Element>
void update_for(const MemoryUpdateParams& params, MemoryUpdateArguments args, cudaStream_t stream) {
  const MemoryProblem& problem = params.problem;
  args.shape = shape_for<Element>(params);
  const PieceLaunch pieces = piece_launch(problem, args.shape);
  args.warps_per_piece = pieces.warps_per_piece;
  args.num_piece_squares = pieces.num_blocks;
  args.num_squares = pieces.num_blocks + num_run_blocks(problem);
  cuda::launch(memory_update_gather,
               {dim3(static_cast<unsigned>(divide_up(args.num_padded_entries, kThreads))), dim3(kThreads), 0, stream},
               args);
  if (problem.row_dim == 0) return;  // rows without columns take their steps all the same
  const cuda::LaunchShape shape{dim3(static_cast<unsigned>(pieces.num_blocks)), dim3(pieces.num_warps * kLanes),
                                kSquareBytes, stream};
  if (has_vectors<Element>(params)) {
    cuda::launch(memory_update_pieces<Element, kElementsPerVector<Element>>, shape, args);
  } else {
    cuda::launch(memory_update_pieces<Element, 1>, shape, args);
  }
  if (args.num_pieces > 1) {
    const int64_t row_dim = problem.row_dim, num_stretches = args.num_pieces / kPiecesPerStretch;
    if (num_stretches > 1) {
      cuda::launch(memory_backward_stretches<MemoryUpdateArguments>, shape_of_sums(num_stretches - 1, row_dim, stream),
                   args);
    }
    cuda::LaunchShape shape_of_runs = shape_of_sums(args.num_pieces - 1, row_dim, stream);
    shape_of_runs.shared_bytes = kSquareBytes;
    cuda::launch(memory_update_runs<Element>, shape_of_runs, args);
  }
  if (args.squares == nullptr) return;
  cuda::launch(memory_update_squares, {dim3(1), dim3(kThreads), kSquareBytes, stream}, args);
}

bool has_nothing(const MemoryUpdateParams& params) {
  const MemoryProblem& problem = params.problem;
  return problem.num_entries == 0 || problem.num_rows == 0 || params.grad_out.sizes[0] == 0 ||
         (problem.row_dim == 0 && params.squares.data != nullptr);
}

int64_t entry_bytes_of(const MemoryProblem& problem) {
  return num_padded_entries_of(problem, kEntriesAhead) * static_cast<int64_t>(sizeof(SortedEntry));
}

// Of steps or of squares.
int64_t result_bytes_of(const MemoryUpdateParams& params) {
  if (params.squares.data == nullptr) return params.problem.num_entries * static_cast<int64_t>(sizeof(RowStep));
  RowShape shape{};
  with_element(params.problem.dtype, [&](auto element) { shape = shape_for<decltype(element)>(params); });
  return (piece_launch(params.problem, shape).num_blocks + num_run_blocks(params.problem)) *
         static_cast<int64_t>(sizeof(double));
}

}  // namespace

int64_t memory_update_workspace_bytes(const MemoryUpdateParams& params, const CudaPlace&) {
  if (has_nothing(params)) return 0;
  return entry_bytes_of(params.problem) + round_up_16(sum_bytes_of(params.problem)) + result_bytes_of(params);
}

void memory_update_cuda(const MemoryUpdateParams& params, const CudaWorkspace& workspace, const CudaPlace& place) {
  const MemoryProblem& problem = params.problem;
  require(problem.num_entries <= INT32_MAX - kEntriesPerPiece, "memory_update: at most 2^31 - 129 entries on CUDA");
  require(workspace.bytes >= memory_update_workspace_bytes(params, place), "memory_update: the workspace is too small");
  const DeviceGuard guard(place.device);
  const StageRange range("memory: update");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  if (has_nothing(params)) {
    if (params.squares.data == nullptr) return;
    cuda_require(cudaMemsetAsync(params.squares.data, 0, sizeof(double), stream), "clearing squares");
    return;
  }
  MemoryUpdateArguments args{};
  args.bag_size = static_cast<uint32_t>(problem.bag_size);
  args.num_rows = static_cast<int32_t>(problem.num_rows);
  args.num_entries = static_cast<int32_t>(problem.num_entries);
  args.num_pieces = static_cast<int32_t>(num_pieces_of(problem));
  args.order = params.order.data;
  args.sorted_rows = params.sorted_rows.data;
  args.targets = params.targets.data;
  args.tokens = params.tokens.data;
  args.weights = params.weights.at<float>();
  args.grad_out = params.grad_out.data;
  args.grad_out_stride = params.grad_out.strides[0];
  args.num_padded_entries = num_padded_entries_of(problem, kEntriesAhead);
  args.algorithm = static_cast<RowAlgorithm>(params.algorithm_code);
  args.values = params.values.data;
  args.values_stride = params.values.strides[0];
  const auto state_of = [](const InOutArray<void, 2>& state) {
    return RowState{state.data, state.strides[0], state.data != nullptr && state.dtype == Dtype::kBFloat16};
  };
  args.first = state_of(params.first);
  args.second = state_of(params.second);
  args.steps = params.steps.data;
  args.steps_stride = params.steps.strides[0];
  args.decayed = params.decayed.data;
  args.decayed_stride = params.decayed.strides[0];
  args.learning_rate = params.learning_rate;
  args.first_beta = params.first_rate;
  args.second_beta = params.second_rate;
  args.total_decay = params.total_decay;
  args.bits = bits_of_step(params.seed, params.step);
  args.scale = static_cast<float>(params.grad_scale);
  args.weight_decay = static_cast<float>(params.weight_decay);
  args.eps = static_cast<float>(params.eps);
  args.first_rate = static_cast<float>(params.first_rate);
  // Of SGD the dampening is the second rate; of Adam the first rate is the first beta.
  const double kept = args.algorithm == RowAlgorithm::kSgd ? params.second_rate : params.first_rate;
  args.new_first = static_cast<float>(1 - kept);
  args.second_rate = static_cast<float>(params.second_rate);
  args.new_second = static_cast<float>(1 - params.second_rate);
  args.is_nesterov = params.nesterov != 0;
  args.is_stochastic = params.stochastic_rounding != 0;
  auto* place_of_sums = static_cast<unsigned char*>(workspace.data) + entry_bytes_of(problem);
  args.entries = static_cast<SortedEntry*>(workspace.data);
  args.sums = reinterpret_cast<float*>(place_of_sums);
  auto* place_of_results = place_of_sums + round_up_16(sum_bytes_of(problem));
  if (params.squares.data != nullptr) {
    args.squares = reinterpret_cast<double*>(place_of_results);
    args.total = params.squares.data;
  } else {
    args.row_steps = reinterpret_cast<RowStep*>(place_of_results);
  }
  with_element(problem.dtype, [&](auto element) { update_for<decltype(element)>(params, args, stream); });
}

}  // namespace topgather
