// Grid and window attention backward on CUDA for groups of one tile: all three gradients of a group in one pass, so that
// scores are computed once. grid_backward_cuda.cuh has the formulas, and the kernels of larger groups.
//
// Who owns what: a thread block owns a tile of tokens of one unit, or of several where groups are small, with the rows of
// all four tensors in shared memory; a warp owns 16 tokens, first as keys, then as queries. Steps:
//   1. place the tile's tokens, gather their rows; softmax terms and shift of each, for which out is read;
//   per kBackwardStep queries of the warp's slot:
//   2. weights and d_scores of the warp's keys;
//   3. grad_value += weights x grad_out, grad_key += d_scores x query; d_scores go to shared memory;
//   then:
//   4. round and write gradients of keys and values, by way of the warp's own rows of values, which nobody else reads;
//   5. grad_query = d_scores, with queries as rows, x keys; round and write.
// Operations a token: 10 G D where the two passes of larger groups take 14. Bytes: five rows read, three written. 16-bit
// types alone: float32 has no matrix unit to wait for.
// Numerics, determinism: as in grid_backward_cuda.cuh.
#pragma once

#include "grid_backward_cuda.cuh"

namespace topgather {

template <typename Element, int kHeadDim>
struct GridGroupSharedMemory {
  using Tiles = GridTiles<Element, kHeadDim>;
  static constexpr int kTokens = Tiles::kTokens;
  static constexpr int kThreads = Tiles::kWarps * kLanes;
  using Tile = cuda::SharedTile<Element, kTokens, kHeadDim>;
  using Rows = grid::RowOffsets<kTokens>;

  Tile row_first;                                        // keys
  Tile row_second;                                       // values
  Tile column_first;                                     // queries
  Tile column_second;                                    // grad_out
  cuda::SharedTile<Element, kTokens, kTokens> d_scores;  // keys as rows
  GridPlaces<kTokens> places;                            // with the rows of keys and values
  Rows query_rows;
  Rows grad_out_rows;
  Rows out_rows;
  Rows grad_query_rows;
  Rows grad_key_rows;
  Rows grad_value_rows;
  // Of the tokens as queries:
  float largest[kTokens];  // of softmax terms
  float factor[kTokens];   // of softmax terms
  float shift[kTokens];
  __device__ __forceinline__ const GridPlaces<kTokens>& rows() const { return places; }
  __device__ __forceinline__ const GridPlaces<kTokens>& columns() const { return places; }
};

namespace grid {

// Step 5: grad_query of queries first_query.. += d_scores x keys, over the keys of their slot.
template <typename Shared, int kColumns>
__device__ __forceinline__ void add_keys(Shared& shared, int first_query, int first_key, int slot_tokens,
                                         float (&grad_query)[1][kColumns / 8][4]) {
  using Element = std::remove_reference_t<decltype(shared.row_first.elements[0])>;
  using Scores = decltype(shared.d_scores);
  const int lane = lane_id();
  const cuda::SharedRow left =
      cuda::shared_row(shared.d_scores.chunk(first_key + lane / 16 * 8 + lane % 8, first_query / 8 + lane / 8 % 2));
  const cuda::SharedRow right = cuda::shared_row(shared.row_first.chunk(first_key + lane % 16, lane / 16));
#pragma unroll
  for (int k = 0; k < Shared::kTokens / 16; ++k) {
    if (k * 16 >= slot_tokens) break;
    if (tokens_there<16>(shared.places.there, first_key + k * 16, Shared::kTokens) == 0) continue;
    uint32_t of_queries[4];
    cuda::load_matrix_x4_transposed(of_queries, Scores::further(left, 0, k * 16));
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t of_keys[4];
      cuda::load_matrix_x4_transposed(of_keys, Shared::Tile::further(right, n * 2, k * 16));
      cuda::multiply_accumulate<Element>(grad_query[0][2 * n], of_queries, of_keys[0], of_keys[1]);
      cuda::multiply_accumulate<Element>(grad_query[0][2 * n + 1], of_queries, of_keys[2], of_keys[3]);
    }
  }
}

// The shifts of all queries: a thread multiplies the chunks of grad_out that it copied itself, which have to be there
// after wait(), with those of out.
template <typename Element, typename Shared, typename Wait>
__device__ __forceinline__ void make_shifts(const GridBackwardArguments& args, Shared& shared, const Wait& wait) {
  constexpr int kChunks = Shared::Tile::kChunks, kRowsAtOnce = Shared::kThreads / kChunks;
  constexpr int kCount = Shared::kTokens / kRowsAtOnce;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks, first = static_cast<int>(threadIdx.x) / kChunks;
  const bool is_column = chunk * Shared::Tile::kPerChunk < args.geometry.head_dim;
  const char* data = static_cast<const char*>(args.out.data);
  uint4 out[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t offset = shared.out_rows[first + i * kRowsAtOnce];
    out[i] = uint4{0, 0, 0, 0};
    if (is_column && offset != kNotThere) out[i] = *reinterpret_cast<const uint4*>(data + offset + chunk * 16);
  }
  wait();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = first + i * kRowsAtOnce;
    const uint4 grad_out = *reinterpret_cast<const uint4*>(shared.column_second.chunk(row, chunk));
    const float shift = cuda::sum_over_lanes<kChunks>(part_of_shift<Element>(out[i], grad_out));
    if (chunk != 0) continue;
    shared.shift[row] = shift;
    if (is_token_there(shared.places.there, row)) args.shift[shared.places.numbers[row]] = shift;
  }
}

// Steps 2 to 4 of a warp whose tokens first_row.. are keys, with queries first.. of its slot.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void differentiate_keys(const GridBackwardArguments& args,
                                                   GridGroupSharedMemory<Element, kHeadDim>& shared, int first_row,
                                                   int first) {
  constexpr int kStep = GridTiles<Element, kHeadDim>::kBackwardStep;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int head_dim = args.geometry.head_dim, end = first + args.geometry.slot_tokens;
  float grad_key[1][kHeadDim / 8][4], grad_value[1][kHeadDim / 8][4];
  cuda::fill(grad_key, 0.0f);
  cuda::fill(grad_value, 0.0f);
#pragma unroll 1
  for (int query = first; query < end; query += kStep) {
    const uint32_t there = tokens_there<kStep>(shared.places.there, query, end);
    if (there == 0) continue;
    const int count = kLanes - __clz(static_cast<int>(there));
    float weights[1][kStep / 8][4], d_scores[1][kStep / 8][4];
    differentiate<true>(args, shared, first_row, query, there, weights, d_scores);
    cuda::multiply_registers<Element>(grad_value, weights, shared.column_second, query, kHeadDim, count);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d_scores[0][n][e] *= args.d_score_scale;
      if (n * 8 >= end - query) continue;
      cuda::store_pair(shared.d_scores, first_row + g, query + n * 8 + 2 * t, d_scores[0][n][0], d_scores[0][n][1]);
      cuda::store_pair(shared.d_scores, first_row + g + 8, query + n * 8 + 2 * t, d_scores[0][n][2], d_scores[0][n][3]);
    }
    cuda::multiply_registers<Element>(grad_key, d_scores, shared.column_first, query, kHeadDim, count);
  }
  const float ones[2] = {1.0f, 1.0f};
  write_rows(grad_value, ones, shared.row_second, first_row, args.grad_second, args.is_second_aligned,
             shared.grad_value_rows, head_dim);
  const float factors[2] = {args.gradient_scale, args.gradient_scale};
  write_rows(grad_key, factors, shared.row_second, first_row, args.grad_first, args.is_first_aligned,
             shared.grad_key_rows, head_dim);
}

}  // namespace grid

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GridGroupSharedMemory<Element, kHeadDim>::kThreads,
                                  GridTiles<Element, kHeadDim>::kBackwardBlocksPerProcessor)
    grid_group_gradients(const GridBackwardArguments args) {
  using Shared = GridGroupSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens;
  constexpr int kBytes = sizeof(Element);
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const uint32_t first_unit = blockIdx.x * (kTokens / static_cast<uint32_t>(geometry.slot_tokens));
  // Step 1.
  const auto note_token = [&](int i, const grid::Token& token) {
    grid::note_token(geometry, shared.places, i, token, args.key, args.value, kBytes);
    shared.query_rows[i] = grid::row_offset(args.query, token, kBytes);
    shared.grad_out_rows[i] = grid::row_offset(args.grad_out, token, kBytes);
    shared.out_rows[i] = grid::row_offset(args.out, token, kBytes);
    shared.grad_query_rows[i] = grid::row_offset(args.grad_query, token, kBytes);
    shared.grad_key_rows[i] = grid::row_offset(args.grad_first, token, kBytes);
    shared.grad_value_rows[i] = grid::row_offset(args.grad_second, token, kBytes);
    grid::load_terms_of(args, token.is_there, grid::number_offset(geometry, token), shared, i);
  };
  const auto unit_of = [first_unit](uint32_t slot) { return first_unit + slot; };
  if (!grid::place_tokens<kTokens>(geometry, unit_of, 0, shared.places.there, note_token)) return;
  const auto gather = [&](typename Shared::Tile& tile, const ConstImage& image, const typename Shared::Rows& rows) {
    grid::gather_rows_async<Shared::kThreads>(tile, image, rows, geometry.head_dim);
  };
  gather(shared.column_first, args.query, shared.query_rows);
  gather(shared.row_first, args.key, shared.places.first);
  gather(shared.row_second, args.value, shared.places.second);
  gather(shared.column_second, args.grad_out, shared.grad_out_rows);
  cuda::copy_async_commit();
  grid::make_shifts<Element>(args, shared, [] { cuda::copy_async_wait<0>(); });
  // Publishes rows and shifts to all warps.
  __syncthreads();
  const int first_row = warp_id() * cuda::kBlockRows;
  const int first = first_row & -geometry.slot_tokens;
  const bool has_work = grid::tokens_there<16>(shared.places.there, first_row, Shared::kTokens) != 0;
  if (has_work) grid::differentiate_keys<Element, kHeadDim>(args, shared, first_row, first);
  // Publishes d_scores to all warps.
  __syncthreads();
  if (!has_work) return;
  float grad_query[1][kHeadDim / 8][4];
  cuda::fill(grad_query, 0.0f);
  grid::add_keys<Shared, kHeadDim>(shared, first_row, first, geometry.slot_tokens, grad_query);
  const float factors[2] = {args.gradient_scale, args.gradient_scale};
  grid::write_rows(grad_query, factors, shared.row_second, first_row, args.grad_query, args.is_query_aligned,
                   shared.grad_query_rows, geometry.head_dim);
}

}  // namespace topgather
