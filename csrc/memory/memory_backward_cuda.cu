// Gradients of lookup and dot on CUDA, over entries sorted by row.
//
//   grad_rows[target] = sum over a row's entries of weights_tk * grad_out_t       [num_targets, W]
//   grad_weights_tk   = dot(values[row], grad_out_t)                              [T, K], where wanted
//
// Sorted entries are cut into pieces of kEntriesPerPiece. The entries of one row form a run; most runs lie within a
// piece; the run of a row that very many tokens chose goes through thousands. Who owns what: a group of 8, 16 or 32
// lanes, as wide as a row needs, walks one piece for one slab of columns at a time; the slabs of a piece go round the
// warps of a thread block. Steps, a kernel each:
//   1. memory_backward_gather: a thread brings one sorted entry's token, weight and rows together, memory_backward_clear:
//      a warp looks for 32 rows of grad_rows among the sorted ones and sets those of no entry to zero;
//   2. memory_backward_pieces: walks a piece in order. A run that lies within the piece is written to grad_rows; what
//      began in an earlier piece goes to the piece's head sum, what goes on in the next to its tail sum. Products with
//      values are added over columns, the slabs meet in shared memory;
//   3. memory_backward_stretches: where a run fills an aligned stretch of kPiecesPerStretch pieces, adds their heads up
//      into the tail sum of the stretch's first piece, which no run needs: a run that fills a piece has no tail there;
//   4. memory_backward_runs: the piece in which a long run begins adds its tail, heads up to the next stretch, sums of
//      stretches, and the heads left over, and writes the row.
// Memory of 16-bit types: 2 W bytes written for each row of grad_rows, and, with grad_weights, 2 W read for each run;
// for each entry 2 W bytes of grad_out, which stays in the second-level cache while T W does, 36 bytes of its own, and 16
// more for each slab. Head and tail sums add 16 W bytes at most for 128 entries.
// Numerics: float32 products and sums, rounded once. No ties. Rows of no entry are zero. An entry whose row is num_rows
// had an index outside the table: no row gets it, and its grad_weights is NaN; or it is of no token, and that is 0.
// Determinism: every sum has an order fixed by sorted positions, shapes and alignment.
#include "../cuda/dispatch.h"
#include "../cuda/rounding.h"
#include "memory_cuda.h"
#include "memory_runs_cuda.cuh"

namespace topgather {

struct MemoryBackwardArguments : MemoryRunArguments {
  const void* values;  // [num_rows, W] dtype; null where grad_weights is
  int64_t values_stride;
  void* grad_rows;      // [num_targets, W] dtype
  float* grad_weights;  // [T, K] float32, or null
  int64_t num_targets;
};

namespace {

// Of a group that walks a piece, in one round: products of every entry with values, added over a slab's columns.
struct SharedMemory {
  float dots[kMaxWarps][kMaxGroups][kEntriesPerPiece];
};

// Whether an entry's gradient goes to row `target` of grad_rows.
__device__ __forceinline__ bool is_target(const MemoryBackwardArguments& args, int32_t target) {
  int32_t low = 0, high = args.num_entries;  // targets[low - 1] < target <= targets[high]
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (args.targets[middle] < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < args.num_entries && args.targets[low] == target && row_at(args, low) != kNoRow;
}

// Where the sum of a run goes, as far as it lies in the piece.
template <typename Element, int kVector>
__device__ __forceinline__ void write_run(const MemoryBackwardArguments& args, const Piece& piece,
                                          const LaneColumns<Element, kVector>& columns, int32_t row, int32_t target,
                                          const float (&sums)[LaneColumns<Element, kVector>::kCount]) {
  if (row == kNoRow) return;
  float* sum = nullptr;
  if (row == piece.row_after) sum = tail_sum(args, piece.idx);
  if (row == piece.row_before) sum = head_sum(args, piece.idx);  // though it may go on in the next piece
  if (sum != nullptr) {
    columns.store_float32(sum, sums);
  } else {
    Element* grad_rows = static_cast<Element*>(args.grad_rows);
    columns.store(grad_rows + target * static_cast<int64_t>(args.shape.row_dim), sums);
  }
}

// One slab of a piece. `dots` are the group's own.
template <typename Element, int kVector, bool kHasValues>
__device__ __forceinline__ void walk_piece(const MemoryBackwardArguments& args, const Piece& piece, int slab,
                                           bool is_first_slab, float* dots) {
  using Columns = LaneColumns<Element, kVector>;
  const int lanes_per_row = args.shape.lanes_per_row;
  const int lane_in_row = lane_id() % lanes_per_row;
  const Columns columns(args.shape, slab, lane_in_row);
  const Element* values = static_cast<const Element*>(args.values);
  const Element* grad_out = static_cast<const Element*>(args.grad_out);
  float sums[Columns::kCount] = {};
  int32_t run_row = kNoRow, run_target = 0;
  // Every lane of the group loads the same entries, a step ahead.
  const SortedEntry* entries = args.entries + piece.first;
  SortedEntry next[kEntriesInFlight];
#pragma unroll
  for (int i = 0; i < kEntriesInFlight; ++i) next[i] = load_entry(entries + i);
#pragma unroll 1
  for (int e = 0; e < kEntriesPerPiece; e += kEntriesInFlight) {
    SortedEntry mine[kEntriesInFlight];
    typename Columns::Part grad_parts[kEntriesInFlight], value_parts[kEntriesInFlight];
#pragma unroll
    for (int i = 0; i < kEntriesInFlight; ++i) {
      mine[i] = next[i];
      columns.load_any(grad_out, static_cast<uint32_t>(mine[i].token), args.grad_out_stride, grad_parts[i]);
      // Those of a run's later entries are in the first-level cache. Nobody uses what an entry of no row loads.
      if constexpr (kHasValues) {
        const uint32_t row = mine[i].row == kNoRow ? 0u : static_cast<uint32_t>(mine[i].row);
        columns.load_any(values, row, args.values_stride, value_parts[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kEntriesInFlight; ++i) next[i] = load_entry(entries + e + kEntriesInFlight + i);
    float products[kEntriesInFlight];
#pragma unroll
    for (int i = 0; i < kEntriesInFlight; ++i) {
      const bool is_new_row = mine[i].row != run_row;
      if (is_new_row) write_run(args, piece, columns, run_row, run_target, sums);
      run_row = mine[i].row;
      run_target = mine[i].target;
      float grad[Columns::kCount];
      unpack(grad_parts[i], grad);
#pragma unroll
      for (int c = 0; c < Columns::kCount; ++c) {
        sums[c] = fmaf(mine[i].weight, grad[c], is_new_row ? 0.0f : sums[c]);
      }
      if constexpr (kHasValues) {
        float value[Columns::kCount];
        unpack(value_parts[i], value);
        products[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < Columns::kCount; ++c) products[i] = fmaf(value[c], grad[c], products[i]);
        if (columns.is_past_end()) products[i] = 0.0f;
      }
    }
    if constexpr (kHasValues) {
      const float dot = sum_over_lanes(products, lanes_per_row);
      if (lane_in_row < kEntriesInFlight) {
        float& total = dots[e + lane_in_row];
        total = is_first_slab ? dot : total + dot;
      }
    }
  }
  write_run(args, piece, columns, run_row, run_target, sums);
}

}  // namespace

// Step 1.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_backward_gather(const MemoryBackwardArguments args) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (position >= args.num_padded_entries) return;
  store_entry(args.entries + position, gather_entry(args, position));
}

template <typename Element, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_backward_clear(const MemoryBackwardArguments args) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kMaxWarps + warp_id()) * kLanes;
  const int64_t mine = first + lane_id();
  const bool is_empty = mine < args.num_targets && !is_target(args, static_cast<int32_t>(mine));
  unsigned empty_rows = __ballot_sync(kAllLanes, is_empty);
  Element* grad_rows = static_cast<Element*>(args.grad_rows);
  const int row_dim = args.shape.row_dim;
  while (empty_rows != 0) {  // whole warps
    const int row = __ffs(static_cast<int>(empty_rows)) - 1;
    empty_rows &= empty_rows - 1;
    Element* grad_row = grad_rows + (first + row) * row_dim;
    for (int column = lane_id() * kVector; column < row_dim; column += kLanes * kVector) {
      if constexpr (kVector > 1) {
        *reinterpret_cast<uint4*>(grad_row + column) = {0u, 0u, 0u, 0u};
      } else {
        grad_row[column] = cuda::from_float<Element>(0.0f);
      }
    }
  }
}

// Step 2.
template <typename Element, int kVector, bool kHasValues>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_backward_pieces(const MemoryBackwardArguments args) {
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(cuda::dynamic_shared_memory());
  const int lanes_per_row = args.shape.lanes_per_row;
  const int groups = kLanes / lanes_per_row;
  const int warps_per_piece = args.warps_per_piece;
  const int pieces_abreast = static_cast<int>(blockDim.x) / kLanes / warps_per_piece;  // warps with a piece a group
  const int warp_of_piece = warp_id() % warps_per_piece;
  const int group = lane_id() / lanes_per_row;
  const int64_t first_piece = static_cast<int64_t>(blockIdx.x) * pieces_abreast * groups;
  Piece piece;
  piece.idx = static_cast<int32_t>(first_piece) + warp_id() / warps_per_piece * groups + group;
  piece.first = static_cast<int64_t>(piece.idx) * kEntriesPerPiece;
  piece.row_before = row_at(args, piece.first - 1);
  piece.row_after = row_at(args, piece.first + kEntriesPerPiece);
  for (int slab = warp_of_piece; slab < args.shape.num_slabs; slab += warps_per_piece) {
    walk_piece<Element, kVector, kHasValues>(args, piece, slab, slab == warp_of_piece, shared.dots[warp_id()][group]);
  }
  if constexpr (!kHasValues) return;
  // Publishes every warp's products to the thread block.
  __syncthreads();
  const int num_entries = pieces_abreast * groups * kEntriesPerPiece;
  for (int e = static_cast<int>(threadIdx.x); e < num_entries; e += static_cast<int>(blockDim.x)) {
    const int64_t position = first_piece * kEntriesPerPiece + e;
    if (position >= args.num_entries) break;
    const int piece_in_block = e / kEntriesPerPiece;
    const int first_warp = piece_in_block / groups * warps_per_piece;
    float dot = 0.0f;
    for (int w = 0; w < warps_per_piece; ++w) {
      dot += shared.dots[first_warp + w][piece_in_block % groups][e % kEntriesPerPiece];
    }
    const int64_t place = args.order[position];
    if (row_at(args, position) == kNoRow) {
      dot = args.tokens != nullptr && args.tokens[place] < 0 ? 0.0f : not_a_number();
    }
    args.grad_weights[place] = dot;
  }
}

// Step 4.
template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_backward_runs(const MemoryBackwardArguments args) {
  const SumTask task = sum_task(args, blockIdx.x * kMaxWarps + static_cast<uint32_t>(warp_id()));
  const LongRun run = long_run_of(args, task);
  if (run.row == kNoRow) return;  // whole warps, and nothing is done by the block
  const int row_dim = args.shape.row_dim;
  float totals[kSumColumns] = {};
  sum_long_run(args, task, run.row, totals);
  Element* grad_row =
      static_cast<Element*>(args.grad_rows) + args.targets[run.last_entry] * static_cast<int64_t>(row_dim);
#pragma unroll
  for (int c = 0; c < kSumColumns; ++c) {
    const int column = task.first_column + c * kLanes;
    if (column < row_dim) grad_row[column] = cuda::from_float<Element>(totals[c]);
  }
}

namespace {

int64_t dot_bytes(int64_t warps) { return warps * static_cast<int64_t>(sizeof(float)) * kMaxGroups * kEntriesPerPiece; }

template <typename Element, int kVector>
void launch_pieces(MemoryBackwardArguments args, int64_t row_dim, cudaStream_t stream) {
  args.shape = row_shape<kVector>(row_dim);
  constexpr int64_t kRowsPerBlock = int64_t{kMaxWarps} * kLanes;
  if (args.num_targets > 0 && row_dim > 0) {
    cuda::launch(memory_backward_clear<Element, kVector>,
                 {dim3(static_cast<unsigned>(divide_up(args.num_targets, kRowsPerBlock))), dim3(kThreads), 0, stream},
                 args);
  }
  args.warps_per_piece = args.shape.num_slabs < kMaxWarps ? args.shape.num_slabs : kMaxWarps;
  const int pieces_abreast = kMaxWarps / args.warps_per_piece;
  const int warps = pieces_abreast * args.warps_per_piece;
  const int pieces = pieces_abreast * (kLanes / args.shape.lanes_per_row);
  const cuda::LaunchShape shape{dim3(static_cast<unsigned>((args.num_pieces + pieces - 1) / pieces)),
                                dim3(warps * kLanes), static_cast<size_t>(dot_bytes(warps)), stream};
  if (args.grad_weights != nullptr) {
    cuda::launch(memory_backward_pieces<Element, kVector, true>, shape, args);
  } else {
    cuda::launch(memory_backward_pieces<Element, kVector, false>, shape, args);
  }
}

template <typename Element>
void backward_for(const MemoryBackwardParams& params, MemoryBackwardArguments args, cudaStream_t stream) {
  const int64_t row_dim = params.problem.row_dim;
  cuda::launch(memory_backward_gather,
               {dim3(static_cast<unsigned>(divide_up(args.num_padded_entries, kThreads))), dim3(kThreads), 0, stream},
               args);
  if (row_dim > 0 && (args.values == nullptr || has_vector_rows<Element>(params.values)) &&
      has_vector_rows<Element>(params.grad_out) && has_vector_rows<Element>(params.grad_rows)) {
    launch_pieces<Element, kElementsPerVector<Element>>(args, row_dim, stream);
  } else {
    launch_pieces<Element, 1>(args, row_dim, stream);
  }
  if (args.num_pieces < 2 || row_dim == 0) return;
  args.shape.row_dim = static_cast<int32_t>(row_dim);
  const int64_t num_stretches = args.num_pieces / kPiecesPerStretch;
  if (num_stretches > 1) {
    cuda::launch(memory_backward_stretches<MemoryBackwardArguments>, shape_of_sums(num_stretches - 1, row_dim, stream),
                 args);
  }
  cuda::launch(memory_backward_runs<Element>, shape_of_sums(args.num_pieces - 1, row_dim, stream), args);
}

}  // namespace

int64_t memory_backward_workspace_bytes(const MemoryBackwardParams& params, const CudaPlace&) {
  const MemoryProblem& problem = params.problem;
  return num_padded_entries_of(problem, kEntriesInFlight) * static_cast<int64_t>(sizeof(SortedEntry)) +
         sum_bytes_of(problem);
}

void memory_backward_cuda(const MemoryBackwardParams& params, const CudaWorkspace& workspace, const CudaPlace& place) {
  const MemoryProblem& problem = params.problem;
  require(problem.num_entries <= INT32_MAX - kEntriesPerPiece, "memory_backward: at most 2^31 - 129 entries on CUDA");
  require(workspace.bytes >= memory_backward_workspace_bytes(params, place),
          "memory_backward: the workspace is too small");
  const DeviceGuard guard(place.device);
  const StageRange range("memory.backward");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  if (problem.num_entries == 0 || params.grad_out.sizes[0] == 0) {  // nobody has an entry
    const auto clear = [&](void* data, int64_t bytes) {
      if (bytes == 0 || data == nullptr) return;
      cuda_require(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream), "clearing gradients");
    };
    clear(params.grad_rows.data, params.num_targets * problem.row_dim * element_bytes(problem.dtype));
    clear(params.grad_weights.data, problem.num_entries * static_cast<int64_t>(sizeof(float)));
    return;
  }
  if (problem.row_dim == 0 && params.grad_weights.data == nullptr) return;
  MemoryBackwardArguments args{};
  args.bag_size = static_cast<uint32_t>(problem.bag_size);
  args.num_rows = static_cast<int32_t>(problem.num_rows);
  args.num_entries = static_cast<int32_t>(problem.num_entries);
  args.num_pieces = static_cast<int32_t>(num_pieces_of(problem));
  // Without rows there is nothing to load; what is loaded for entries of no row may then come from anywhere.
  const bool has_rows = problem.num_rows > 0;
  args.values = params.grad_weights.data == nullptr ? nullptr : has_rows ? params.values.data : params.grad_out.data;
  args.values_stride = has_rows ? params.values.strides[0] : 0;
  args.order = params.order.data;
  args.sorted_rows = params.sorted_rows.data;
  args.targets = params.targets.data;
  args.tokens = params.tokens.data;
  args.weights = params.weights.at<float>();
  args.grad_out = params.grad_out.data;
  args.grad_out_stride = params.grad_out.strides[0];
  args.grad_rows = params.grad_rows.data;
  args.grad_weights = params.grad_weights.at<float>();
  args.num_targets = params.num_targets;
  args.num_padded_entries = num_padded_entries_of(problem, kEntriesInFlight);
  args.entries = static_cast<SortedEntry*>(workspace.data);
  args.sums = reinterpret_cast<float*>(args.entries + args.num_padded_entries);
  with_element(problem.dtype, [&](auto element) { backward_for<decltype(element)>(params, args, stream); });
}

std::vector<CudaKernelFacts> memory_cuda_kernel_facts() {
  std::vector<CudaKernelFacts> facts;
  add_product_key_kernel_facts(facts);
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    facts.push_back({"memory_backward_pieces", dtype, 0, kThreads, dot_bytes(kMaxWarps)});
  }
  return facts;
}

}  // namespace topgather
