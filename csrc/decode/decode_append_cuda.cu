// New keys and values into a cache, on CUDA.
//
//   key_pages[place(t)] = key_t,   value_pages[place(t)] = value_t,   t from seq_lens[s] on
//   centroid of a block = sum of its keys so far; their mean when the block is whole
//
// Who owns what: a thread block owns one block of one sequence and key head that the new tokens touch: their rows in
// it, and its centroid. Steps:
//   1. copy keys and values, 16 bytes at a time where rows are aligned;
//   2. a thread adds a column's new keys in the order of tokens to what the centroid holds, or to 0 where the first key
//      of the block is among them; the last key of the block divides the sum by block_size.
// Both steps read the new tokens and neither reads what the other writes: there is no barrier.
// Numerics: float32 sums of the keys as stored: the CPU's bits, however a sequence is split into appends. Without new
// tokens nothing is written. A token past the sequence's room, or on a page that does not exist, is dropped.
// Determinism: a block's centroid depends on its own keys alone.
#include "decode_config_cuda.h"
#include "decode_cuda.h"
#include "decode_pages_cuda.cuh"

namespace topgather {

namespace {
constexpr int kThreads = DecodeAppendCudaConfig::kThreads;
}

struct CacheAppendArguments {
  DecodeGeometry geometry;
  uint32_t blocks_per_unit;  // that new tokens may touch
  bool are_key_rows_aligned;
  bool are_value_rows_aligned;
  Array<const void, 4> key;         // [batch, kv head, M, D] dtype
  Array<const void, 4> value;       // [batch, kv head, M, V] dtype
  InOutArray<void, 4> key_pages;    // [page, kv head, page_size, D] dtype
  InOutArray<void, 4> value_pages;  // [page, kv head, page_size, V] dtype
  InOutArray<void, 4> centroids;    // [page, kv head, blocks of a page, D] float32
};

namespace {

// Step 1: rows of `dim` elements, a Piece at a time.
template <typename Piece, typename Element>
__device__ __forceinline__ void copy_pieces(const Element* source, int64_t source_stride, Element* target,
                                            int64_t target_stride, int num_rows, int dim) {
  constexpr int kInFlight = DecodeAppendCudaConfig::kPiecesInFlight;
  constexpr int kPerPiece = static_cast<int>(sizeof(Piece) / sizeof(Element));
  const uint32_t per_row = static_cast<uint32_t>(dim / kPerPiece);
  const uint32_t count = per_row * static_cast<uint32_t>(num_rows);
  for (uint32_t first = threadIdx.x; first < count; first += kInFlight * kThreads) {
    Piece pieces[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t piece = first + i * kThreads, row = piece / per_row;
      if (piece >= count) continue;
      pieces[i] = *reinterpret_cast<const Piece*>(source + row * source_stride + (piece - row * per_row) * kPerPiece);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t piece = first + i * kThreads, row = piece / per_row;
      if (piece >= count) continue;
      *reinterpret_cast<Piece*>(target + row * target_stride + (piece - row * per_row) * kPerPiece) = pieces[i];
    }
  }
}

template <typename Element>
__device__ __forceinline__ void copy_rows(const Element* source, int64_t source_stride, Element* target,
                                          int64_t target_stride, int num_rows, int dim, bool is_aligned) {
  if (is_aligned) {
    copy_pieces<uint4>(source, source_stride, target, target_stride, num_rows, dim);
  } else {
    copy_pieces<Element>(source, source_stride, target, target_stride, num_rows, dim);
  }
}

// Step 2.
template <typename Element>
__device__ __forceinline__ void add_keys(const Element* keys, int64_t key_stride, int num_keys, int head_dim,
                                         bool is_begun, bool is_whole, int block_size, float* centroid) {
  constexpr int kInFlight = DecodeAppendCudaConfig::kKeysInFlight;
  for (int d = threadIdx.x; d < head_dim; d += kThreads) {
    float sum = is_begun ? centroid[d] : 0.0f;
    for (int first = 0; first < num_keys; first += kInFlight) {
      float elements[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (first + i < num_keys) elements[i] = cuda::to_float(keys[(first + i) * key_stride + d]);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (first + i < num_keys) sum += elements[i];
      }
    }
    centroid[d] = is_whole ? sum / static_cast<float>(block_size) : sum;
  }
}

}  // namespace

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1) moba_cache_append(const CacheAppendArguments args) {
  const DecodeGeometry& geometry = args.geometry;
  const uint32_t unit_idx = blockIdx.x / args.blocks_per_unit;
  const DecodeUnit unit = decode_unit(geometry, unit_idx);
  const int32_t cached = geometry.seq_lens[unit.sequence];
  int32_t count = geometry.num_tokens == nullptr ? geometry.query_len : geometry.num_tokens[unit.sequence];
  count = min(count, geometry.query_len);
  if (cached < 0 || cached >= geometry.capacity || count <= 0) return;
  // Tokens from `cached` up to `end` are stored.
  const int64_t end = min(static_cast<int64_t>(cached) + count, geometry.capacity);
  const uint32_t first_block = static_cast<uint32_t>(cached) / static_cast<uint32_t>(geometry.block_size);
  const int64_t block_start =
      (static_cast<int64_t>(first_block) + (blockIdx.x - unit_idx * args.blocks_per_unit)) * geometry.block_size;
  const int64_t block_end = block_start + geometry.block_size;
  if (block_start >= end) return;  // the grid is a bound taken from shapes
  const bool is_begun = block_start < cached;
  const int32_t first = is_begun ? cached : static_cast<int32_t>(block_start);
  const int num_new = static_cast<int>(min(end, block_end) - first);
  const CachePlace place = cache_place(geometry, unit.sequence, first);
  if (place.page == kNoSuchPage) return;

  const Element* keys = args.key.at<Element>(unit.sequence, unit.kv_head, first - cached);
  const Element* values = args.value.at<Element>(unit.sequence, unit.kv_head, first - cached);
  copy_rows(keys, args.key.strides[2], page_row<Element>(args.key_pages, unit.kv_head, place),
            args.key_pages.strides[2], num_new, geometry.head_dim, args.are_key_rows_aligned);
  copy_rows(values, args.value.strides[2], page_row<Element>(args.value_pages, unit.kv_head, place),
            args.value_pages.strides[2], num_new, geometry.value_dim, args.are_value_rows_aligned);
  const CachePlace centroid_place{
      place.page, static_cast<int32_t>(static_cast<uint32_t>(place.row) / static_cast<uint32_t>(geometry.block_size))};
  add_keys(keys, args.key.strides[2], num_new, geometry.head_dim, is_begun, first + num_new == block_end,
           geometry.block_size, page_row<float>(args.centroids, unit.kv_head, centroid_place));
}

namespace {

template <typename Element>
void launch_for(const CacheAppendParams& params, cudaStream_t stream) {
  const DecodeProblem& problem = params.problem;
  CacheAppendArguments args{};
  args.geometry = decode_geometry(problem);
  // The first block may be begun already.
  const int64_t blocks_per_unit = divide_up(problem.query_len - 1, problem.block_size) + 1;
  const int64_t num_items = blocks_per_unit * args.geometry.num_units;
  require(num_items < INT32_MAX, "moba_cache_append: more than 2^31 - 1 blocks to append to");
  const int64_t max_new = problem.query_len < problem.block_size ? problem.query_len : problem.block_size;
  const int64_t widest = problem.head_dim < problem.value_dim ? problem.value_dim : problem.head_dim;
  require(max_new * widest < INT32_MAX - DecodeAppendCudaConfig::kPiecesInFlight * kThreads,
          "moba_cache_append: the new tokens of one block must have fewer than 2^31 elements a head");
  args.blocks_per_unit = static_cast<uint32_t>(blocks_per_unit);
  args.are_key_rows_aligned = has_whole_pieces(params.key) && has_whole_pieces(params.key_pages);
  args.are_value_rows_aligned = has_whole_pieces(params.value) && has_whole_pieces(params.value_pages);
  args.key = params.key;
  args.value = params.value;
  args.key_pages = params.key_pages;
  args.value_pages = params.value_pages;
  args.centroids = params.centroids;
  cuda::launch(moba_cache_append<Element>, {dim3(static_cast<unsigned>(num_items)), dim3(kThreads), 0, stream}, args);
}

}  // namespace

void moba_cache_append_cuda(const CacheAppendParams& params, const CudaWorkspace&, const CudaPlace& place) {
  const DecodeProblem& problem = params.problem;
  if (problem.batch_size == 0 || problem.num_kv_heads == 0 || problem.query_len == 0 || problem.num_pages == 0 ||
      problem.pages_per_sequence == 0) {
    return;
  }
  const DeviceGuard guard(place.device);
  const StageRange range("decode.append");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  with_element(problem.dtype, [&](auto element) { launch_for<decltype(element)>(params, stream); });
}

}  // namespace topgather
