// The best pairs of product keys where half scores are infinite or NaN, on CUDA: what memory_topk_cuda.cuh leaves to it.
//
// All sums with an infinite half are equal, so that of those pairs the lower index i n + j comes first. The ranks that
// the search goes by say nothing about that: with +inf in one half, the lowest partner need not be among the best.
//
// Runs after every search. A row's best and worst score tell whether any of its pairs is of this kind: it then does the
// row again, and no other. Who owns what: a lane looks at one row of the result, and a warp does again those of its 32
// rows that ask for it, one after the other. Steps for such a row:
//   1. all half scores, a key a lane: the first keys of every kind, in order, and the best of those that are numbers;
//   2. pairs that rank as +inf, the first ones of all;
//   3. the best sums of two numbers, as many as are still wanted: those of ranks a and b with (a + 1) (b + 1) at most
//      that;
//   4. pairs that rank as -inf, the first ones of all.
// Numerics: plain float32 multiply-adds, in the order of a row's columns. One kernel for all dtypes: such rows are rare.
// Determinism: a row's results depend on its own query and the keys alone.
#include "memory_topk_cuda.cuh"

namespace topgather {

struct InfiniteRowsArguments {
  ProductKeyArguments search;
  Dtype dtype;  // of queries and keys
};

namespace product_key {
namespace infinite {

constexpr int kWarps = 4;
constexpr int kPerLane = static_cast<int>(kProductKeyMaxTopK) / kLanes;
constexpr int kListLength = kPerLane * kLanes;
static_assert(kListLength == kProductKeyMaxTopK);

// The first keys of a half that are of one kind, ascending, as entries; no more than are wanted.
struct KeyList {
  uint64_t entries[kListLength];
};
enum Kind { kPlus, kMinus, kNotMinus, kAny, kNumKinds };

struct WarpMemory {
  KeyList keys[2][kNumKinds];
  uint64_t numbers[2][kListLength];  // the best, descending
  uint64_t pending[kLanes];
};
struct KeyCounts {
  int of_kind[kNumKinds];
  int numbers;
};

__device__ __forceinline__ bool is_plus(uint64_t entry) { return ordinal_in(entry) >= kInfinityOrdinal; }
__device__ __forceinline__ bool is_minus(uint64_t entry) { return ordinal_in(entry) == kMinusInfinityOrdinal; }
__device__ __forceinline__ float true_score(uint64_t entry) {
  const uint32_t ordinal = ordinal_in(entry);
  return ordinal == kNanOrdinal ? NAN : score_of(ordinal);
}

__device__ __forceinline__ void append(KeyList& list, int& count, int most, uint64_t entry, bool belongs) {
  const unsigned belonging = __ballot_sync(kAllLanes, belongs);
  const int position = count + __popc(belonging & ((1u << lane_id()) - 1));
  if (belongs && position < most) list.entries[position] = entry;
  count = min(count + __popc(belonging), most);
}

template <typename Element>
__device__ __forceinline__ float dot(const Element* query, const Element* key, int dim) {
  float sum = 0.0f;
#pragma unroll 4
  for (int d = 0; d < dim; ++d) sum = fmaf(cuda::to_float(query[d]), cuda::to_float(key[d]), sum);
  return sum;
}

__device__ __forceinline__ float half_score(const InfiniteRowsArguments& args, int64_t token, int64_t head, int half,
                                            int key) {
  const auto score = [&](auto element) {
    using Element = decltype(element);
    return dot(args.search.query.at<Element>(token, head, half), args.search.keys.at<Element>(head, half, key),
               args.search.half_dim);
  };
  if (args.dtype == Dtype::kBFloat16) return score(BFloat16{});
  return args.dtype == Dtype::kFloat16 ? score(Float16{}) : score(0.0f);
}

// Step 1 of one half.
__device__ __forceinline__ KeyCounts look_at_keys(const InfiniteRowsArguments& rows, WarpMemory& memory, int half,
                                                  int64_t token, int64_t head) {
  const ProductKeyArguments& args = rows.search;
  const int lane = lane_id();
  KeyCounts counts{};
  SumList<kPerLane> best(args.top_k);
  int num_pending = 0, num_numbers = 0;
#pragma unroll 1
  for (int first = 0; first < args.num_keys; first += kLanes) {
    const int key = first + lane;
    const bool exists = key < args.num_keys;
    const float score = exists ? half_score(rows, token, head, half, key) : 0.0f;
    const uint64_t entry = half_entry(ordinal_of(score), static_cast<uint32_t>(key));
    const bool plus = exists && is_plus(entry), minus = exists && is_minus(entry);
    append(memory.keys[half][kPlus], counts.of_kind[kPlus], args.top_k, entry, plus);
    append(memory.keys[half][kMinus], counts.of_kind[kMinus], args.top_k, entry, minus);
    append(memory.keys[half][kNotMinus], counts.of_kind[kNotMinus], args.top_k, entry, exists && !minus);
    append(memory.keys[half][kAny], counts.of_kind[kAny], args.top_k, entry, exists);
    const bool number = exists && !plus && !minus;
    num_numbers += __popc(__ballot_sync(kAllLanes, number));
    offer(best, memory.pending, num_pending, entry, number && entry > best.worst);
  }
  if (num_pending > 0) enter_pending(best, memory.pending, num_pending);
  counts.numbers = min(num_numbers, args.top_k);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) memory.numbers[half][j * kLanes + lane] = best.list[j];
  return counts;
}

// Where a row's results go, and how many of them there are.
struct RowResults {
  float* scores;
  int64_t* indices;
  int count;
};

// Steps 2 and 4: every key of `firsts` with all that belong to it of the second half. Each has a partner, but for those
// of a list that is as long as the half.
__device__ __forceinline__ void append_pairs(const ProductKeyArguments& args, const WarpMemory& memory,
                                             const KeyCounts& second_counts, bool is_of_plus, Kind firsts,
                                             int num_firsts, RowResults& results) {
#pragma unroll 1
  for (int a = 0; a < num_firsts && results.count < args.top_k; ++a) {
    const uint64_t first = memory.keys[0][firsts].entries[a];
    const Kind with = is_of_plus ? (is_plus(first) ? kNotMinus : kPlus) : (is_minus(first) ? kAny : kMinus);
    const int num_seconds = with == kPlus    ? second_counts.of_kind[kPlus]
                            : with == kMinus ? second_counts.of_kind[kMinus]
                            : with == kAny   ? second_counts.of_kind[kAny]
                                             : second_counts.of_kind[kNotMinus];
    const int num_written = min(num_seconds, args.top_k - results.count);
#pragma unroll 1
    for (int b = lane_id(); b < num_written; b += kLanes) {
      const uint64_t second = memory.keys[1][with].entries[b];
      results.scores[results.count + b] = true_score(first) + true_score(second);
      results.indices[results.count + b] = static_cast<int64_t>(index_in(first)) * args.num_keys + index_in(second);
    }
    results.count += num_written;
  }
}

// Step 3.
__device__ __forceinline__ void append_numbers(const ProductKeyArguments& args, WarpMemory& memory, int num_first,
                                               int num_second, RowResults& results) {
  const int lane = lane_id(), num_wanted = args.top_k - results.count;
  SumList<kPerLane> sums(num_wanted);
  int num_pending = 0, num_pairs = 0;
#pragma unroll 1
  for (int a = 0; a < min(num_first, num_wanted); ++a) {
    const int num_seconds = min(num_second, num_wanted / (a + 1));
    num_pairs += num_seconds;
    const uint64_t first = memory.numbers[0][a];
#pragma unroll 1
    for (int b = 0; b < num_seconds; b += kLanes) {
      const bool exists = b + lane < num_seconds;
      const uint64_t second = memory.numbers[1][exists ? b + lane : 0];
      const uint64_t entry =
          make_entry(ordinal_of(true_score(first) + true_score(second)),
                     index_in(first) * static_cast<uint32_t>(args.num_keys) + index_in(second), false);
      offer(sums, memory.pending, num_pending, entry, exists && entry > sums.worst);
    }
  }
  if (num_pending > 0) enter_pending(sums, memory.pending, num_pending);
  const int num_written = min(num_pairs, num_wanted);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int rank = j * kLanes + lane;
    if (rank >= num_written) continue;
    results.scores[results.count + rank] = score_of(ordinal_in(sums.list[j]));
    results.indices[results.count + rank] = index_in(sums.list[j]);
  }
  results.count += num_written;
}

}  // namespace infinite
}  // namespace product_key

__global__ void __launch_bounds__(product_key::infinite::kWarps* kLanes)
    product_key_infinite(const InfiniteRowsArguments rows) {
  using namespace product_key;
  using namespace product_key::infinite;
  const ProductKeyArguments& args = rows.search;
  WarpMemory& memory = reinterpret_cast<WarpMemory*>(cuda::dynamic_shared_memory())[warp_id()];
  const int64_t num_rows = args.num_tokens * args.num_heads;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp_id()) * kLanes;
  const int64_t own_row = first_row + lane_id();
  bool is_wanted = false;
  if (own_row < num_rows) {
    const float* scores = args.scores + own_row * args.top_k;
    is_wanted = !isfinite(scores[0]) || !isfinite(scores[args.top_k - 1]);
  }
#pragma unroll 1
  for (unsigned wanted = __ballot_sync(kAllLanes, is_wanted); wanted != 0; wanted &= wanted - 1) {
    const int64_t row = first_row + __ffs(static_cast<int>(wanted)) - 1;
    const int64_t token = row / args.num_heads, head = row - token * args.num_heads;
    const KeyCounts first = look_at_keys(rows, memory, 0, token, head);
    const KeyCounts second = look_at_keys(rows, memory, 1, token, head);
    // Publishes the lists to the warp.
    __syncwarp();
    RowResults results{args.scores + row * args.top_k, args.indices + row * args.top_k, 0};
    const Kind pluses = second.of_kind[kPlus] > 0 ? kNotMinus : kPlus;
    append_pairs(args, memory, second, true, pluses, pluses == kPlus ? first.of_kind[kPlus] : first.of_kind[kNotMinus],
                 results);
    if (results.count < args.top_k) append_numbers(args, memory, first.numbers, second.numbers, results);
    const Kind minuses = second.of_kind[kMinus] > 0 ? kAny : kMinus;
    append_pairs(args, memory, second, false, minuses, minuses == kMinus ? first.of_kind[kMinus] : first.of_kind[kAny],
                 results);
    // Tells the warp that the lists have been read and may be overwritten.
    __syncwarp();
  }
}

void rewrite_infinite_rows(const ProductKeyArguments& args, Dtype dtype, cudaStream_t stream) {
  using product_key::infinite::kWarps;
  using product_key::infinite::WarpMemory;
  constexpr int64_t kRows = kWarps * kLanes;
  const int64_t num_rows = args.num_tokens * args.num_heads;
  const int64_t num_thread_blocks = (num_rows + kRows - 1) / kRows;
  require(num_thread_blocks <= INT32_MAX, "product_key_topk: more rows than thread blocks can take");
  const cuda::LaunchShape shape{dim3(static_cast<unsigned>(num_thread_blocks)), dim3(kRows),
                                kWarps * sizeof(WarpMemory), stream};
  cuda::launch(product_key_infinite, shape, InfiniteRowsArguments{args, dtype});
}

void add_infinite_rows_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  using product_key::infinite::kWarps;
  for (const Dtype dtype : kCudaDtypes) {
    facts.push_back({"product_key_infinite", dtype, 2 * kProductKeyMaxHalfDim, kWarps * kLanes,
                     kWarps * static_cast<int64_t>(sizeof(product_key::infinite::WarpMemory))});
  }
}

}  // namespace topgather
