// Choices joined with a sliding window (moba_window.h), on CUDA, for attention and its gradient to take as choices.
//
//   joined_i = choice_i, blocks of i's window that are whole and not chosen, the window's edge unless chosen
//
// Who owns what: a thread takes a query of a choice head. What is wrong with a choice stays so: the lists judge it. A
// query of no sequence, or that sees no key, gets -1 behind its choice.
// Numerics: integers. Determinism: a query's blocks depend on its own choice and position alone.
#include <algorithm>

#include "../common/checks.h"
#include "../cuda/launch.cuh"
#include "moba_stages_cuda.cuh"
#include "moba_window.h"

namespace topgather {

namespace {
constexpr int kWindowThreads = 256;
}

struct JoinArguments {
  MobaGeometry geometry;  // of the joined problem
  int32_t num_chosen;     // slots of a choice
  int32_t num_choice_heads;
  int32_t first_head;                     // of this launch, of all batch entries' heads
  Array<const int32_t, 4> block_indices;  // [batch, choice head, query, num_chosen] int32
  int32_t* joined;                        // [batch, choice head, query, top_k] int32
};

__global__ void __launch_bounds__(kWindowThreads) moba_join_window(const JoinArguments args) {
  const MobaGeometry& geometry = args.geometry;
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kWindowThreads + threadIdx.x;
  if (query >= geometry.query_len) return;  // no barrier follows
  const uint32_t head_of_all = static_cast<uint32_t>(args.first_head) + blockIdx.y;
  const uint32_t batch = head_of_all / static_cast<uint32_t>(args.num_choice_heads);
  const uint32_t head = head_of_all - batch * static_cast<uint32_t>(args.num_choice_heads);
  const int32_t* choices = args.block_indices.at<int32_t>(batch, head, query);
  int32_t* joined = args.joined + (head_of_all * geometry.query_len + query) * geometry.top_k;
  for (int slot = 0; slot < args.num_chosen; ++slot) joined[slot] = choices[slot];
  const SequenceOnDevice sequence = sequence_of_query(geometry, query);
  const int64_t position = sequence.exists ? query - sequence.first_query + sequence.position_offset : -1;
  const int64_t start = position + 1 > geometry.window ? position + 1 - geometry.window : 0;
  // Positions number less than 2^31. 64-bit division is a call.
  const uint32_t block_size = static_cast<uint32_t>(geometry.block_size);
  const int32_t own = position < 0 ? -1 : static_cast<int32_t>(static_cast<uint32_t>(position) / block_size);
  const int32_t first = static_cast<int32_t>(static_cast<uint32_t>(start) / block_size);
  const bool has_edge = static_cast<uint32_t>(start) - static_cast<uint32_t>(first) * block_size != 0;
  const auto unless_chosen = [&](int32_t block) {
    for (int slot = 0; slot < args.num_chosen; ++slot) {
      if (choices[slot] == block) return -1;
    }
    return block;
  };
  const int32_t edge_slot = geometry.top_k - 1;
  int32_t block = own < 0 || has_edge ? first + 1 : first;
  for (int slot = args.num_chosen; slot < edge_slot; ++slot, ++block) {
    joined[slot] = block <= own ? unless_chosen(block) : -1;
  }
  joined[edge_slot] = own >= 0 && has_edge ? unless_chosen(first) : -1;
}

MobaProblem problem_with_window(const MobaProblem& problem) {
  MobaProblem joined = problem;
  joined.top_k += window_slots(problem.window, problem.block_size);
  return joined;
}

Array<const int32_t, 4> join_window(const MobaProblem& problem, const MobaGeometry& geometry,
                                    const Array<const int32_t, 4>& block_indices, WorkspaceCutter& cutter,
                                    cudaStream_t stream) {
  if (problem.window == 0) return block_indices;
  const int64_t batch_size = block_indices.sizes[0], num_heads = block_indices.sizes[1];
  const int64_t head_elements = problem.query_len * geometry.top_k;
  auto* joined = cutter.take<int32_t>(batch_size * num_heads * head_elements);
  const Array<const int32_t, 4> result{joined,
                                       {batch_size, num_heads, problem.query_len, geometry.top_k},
                                       {num_heads * head_elements, head_elements, geometry.top_k, 1},
                                       Dtype::kInt32};
  if (joined == nullptr) return result;
  require(batch_size * num_heads <= INT32_MAX, "at most 2^31 - 1 heads of choices on CUDA");
  for (int64_t first = 0; first < batch_size * num_heads; first += MobaWaveConfig::kMaxUnits) {
    const auto count = static_cast<unsigned>(std::min(batch_size * num_heads - first, MobaWaveConfig::kMaxUnits));
    const auto grid_x = static_cast<unsigned>(divide_up(problem.query_len, kWindowThreads));
    cuda::launch(moba_join_window, {dim3(grid_x, count), dim3(kWindowThreads), 0, stream},
                 {geometry, static_cast<int32_t>(problem.top_k), static_cast<int32_t>(num_heads),
                  static_cast<int32_t>(first), block_indices, joined});
  }
  return result;
}

}  // namespace topgather
