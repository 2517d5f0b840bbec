// The backward of grid and window attention on CUDA for groups of more than a tile, 16-bit types and head_dim up to 64:
// keys as rows, and of groups of up to kTokens also the gradient of queries, so that scores are computed once.
// grid_backward_cuda.cuh has the formulas.
//
// Who owns what: a thread block owns 256 tokens of one unit as keys, a warp 32 of them; all queries of the unit come
// by, 64 at a time, copied one stage ahead. Steps:
//   1. find the unit, gather rows of keys and values; a warp takes its values to registers, as a left operand;
//   per 64 queries:
//   2. gather the rows of the next stage's queries; softmax terms and shift of 128 queries at a time, shift made here
//      where the unit has no other keys;
//   3. per 16 queries: weights and d_scores of the warp's keys; grad_value += weights x grad_out, grad_key += d_scores x
//      query; d_scores go to shared memory, over the values, where the unit has no other keys;
//   4. there: a warp turns to 16 queries and half of head_dim, grad_query = d_scores, with queries as rows, x keys;
//   last:
//   5. round and write the gradients of keys and values.
// Operations a token: 10 G D where two passes take 14. Shared memory's cycles bound the kernel as much as products do: a
// fragment of queries that is loaded meets two tiles of keys.
// Numerics, determinism: as in grid_backward_cuda.cuh; shift is what the sums of d_scores start with.
#pragma once

#include "grid_backward_cuda.cuh"

namespace topgather {

template <typename Element, int kHeadDim>
struct GridUnitSharedMemory {
  using Tiles = GridLargeTiles<kHeadDim>;
  static constexpr int kTokens = Tiles::kUnitTokens;
  static constexpr int kQueries = Tiles::kUnitQueries;
  static constexpr int kTerms = 2 * kQueries;
  static constexpr int kThreads = kTokens / 32 * kLanes;
  using KeyTile = cuda::SharedTile<Element, kTokens, kHeadDim>;
  using QueryTile = cuda::SharedTile<Element, kQueries, kHeadDim>;
  static_assert(kHeadDim == kQueries, "d_scores take the place of values");
  struct Stage {
    QueryTile query;
    QueryTile grad_out;
  };

  KeyTile keys;
  KeyTile d_scores;  // keys as rows; values at first
  Stage stages[2];
  // Of kTerms queries:
  float largest[kTerms];  // of softmax terms
  float factor[kTerms];   // of softmax terms
  float minus_shift[kTerms];
  uint32_t there[2 * kTerms / kLanes];  // a bit a query, of these and of those before or after
  // Of the thread block's unit:
  const char* query;
  const char* grad_out;
  const char* out;
  char* grad_query;
  int64_t first_number;  // where its first token's lse stands
  uint32_t num_rows;
  uint32_t num_columns;
  uint32_t head;
};

namespace grid {

// A bit for each of the 16 queries from `number` on.
template <typename Shared>
__device__ __forceinline__ uint32_t queries_there(const Shared& shared, uint32_t number) {
  return shared.there[number / kLanes % (2 * Shared::kTerms / kLanes)] >> (number % kLanes) & 0xffffu;
}

// Where a query's lse and shift stand.
template <typename Shared>
__device__ __forceinline__ int64_t number_of_query(const GridGeometry& geometry, const Shared& shared,
                                                   const TokenOfUnit& token) {
  const int64_t row = static_cast<int64_t>(token.row * geometry.rows.token_step) * geometry.columns.size;
  return shared.first_number + row + token.column * geometry.columns.token_step;
}

// Step 2's numbers of queries `first`..: a thread takes a query's softmax terms, and as many lanes as a row has chunks
// its shift.
template <typename Element, typename Shared>
__device__ __forceinline__ void load_unit_terms(const GridBackwardArguments& args, Shared& shared, uint32_t first) {
  constexpr int kChunks = Shared::KeyTile::kChunks, kRowsAtOnce = Shared::kThreads / kChunks;
  constexpr int kRows = Shared::kTerms / kRowsAtOnce;
  const GridGeometry& geometry = args.geometry;
  const int i = cuda::thread_index_here(), chunk = i % kChunks;
  const auto token_at = [&](int query) {
    return token_of_unit(geometry, shared.num_rows, shared.num_columns, first + static_cast<uint32_t>(query));
  };
  uint4 out[kRows], grad_out[kRows];
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    const TokenOfUnit token = token_at(n * kRowsAtOnce + i / kChunks);
    out[n] = grad_out[n] = uint4{0, 0, 0, 0};
    if (args.out.data == nullptr || !token.is_there || chunk * Shared::KeyTile::kPerChunk >= geometry.head_dim)
      continue;
    out[n] = *reinterpret_cast<const uint4*>(shared.out + args.out_steps.to(token) + chunk * 16);
    grad_out[n] = *reinterpret_cast<const uint4*>(shared.grad_out + args.grad_out_steps.to(token) + chunk * 16);
  }
  if (i < Shared::kTerms) {
    const TokenOfUnit token = token_at(i);
    const int64_t number = number_of_query(geometry, shared, token);
    const SoftmaxTerms<float> terms = softmax_terms_of(args, token.is_there, number);
    shared.largest[i] = terms.largest;
    shared.factor[i] = terms.factor;
    if (args.out.data == nullptr) shared.minus_shift[i] = -given_shift_of(args, token.is_there, number);
    const uint32_t of_warp = __ballot_sync(kAllLanes, token.is_there);
    if (i % kLanes == 0) shared.there[(first / Shared::kTerms % 2 * Shared::kTerms + i) / kLanes] = of_warp;
  }
  if (args.out.data == nullptr) return;
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    const float shift = cuda::sum_over_lanes<kChunks>(part_of_shift<Element>(out[n], grad_out[n]));
    if (chunk != 0) continue;
    const int query = n * kRowsAtOnce + i / kChunks;
    shared.minus_shift[query] = -shift;
    const TokenOfUnit token = token_at(query);
    if (token.is_there) args.shift[number_of_query(geometry, shared, token)] = shift;
  }
}

// What a warp keeps in registers of its 32 keys while queries come by.
template <int kSteps>
struct KeysOfWarp {
  uint32_t values[kSteps][2][4];  // as the left operand
  cuda::SharedRow keys;           // where the left operand starts
  cuda::SharedRow queries;  // where queries as the right operand start, as rows and as columns, in the first stage
  cuda::SharedRow query_columns;
  int first_d_score;   // the element that the lane writes first, without its row's exchange
  int first_row;       // in the tile
  uint32_t first_key;  // in the unit
  uint32_t there;      // a bit a key
};

// sums += left x sixteen rows, all columns.
template <typename Element, int kPairs, int kN>
__device__ __forceinline__ void add_products(float (&sums)[2][kN][4], const uint32_t (&left)[2][4],
                                             const uint32_t (&columns)[kPairs][4]) {
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      cuda::multiply_accumulate<Element>(sums[m][2 * n], left[m], columns[n][0], columns[n][1]);
      cuda::multiply_accumulate<Element>(sums[m][2 * n + 1], left[m], columns[n][2], columns[n][3]);
    }
  }
}

// Scores of keys first_key.. and queries first_query.. as far as both are there, plus bias.
__device__ __forceinline__ void add_unit_bias(const GridBackwardArguments& args, uint32_t head, uint32_t first_key,
                                              uint32_t keys_there, uint32_t first_query, uint32_t queries_there,
                                              float (&scores)[2][2][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t group = args.geometry.max_tokens;
#pragma unroll
  for (int h = 0; h < 4; ++h) {
    if ((keys_there >> (h * 8 + g) & 1u) == 0) continue;
    const float* bias = args.bias + head * group * group + (static_cast<int64_t>(first_key) + h * 8 + g);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[h / 2][n][h % 2 * 2 + e];
        const int i = n * 8 + 2 * t + e;
        if ((queries_there >> i & 1u) != 0) {
          score = fmaf(bias[(static_cast<int64_t>(first_query) + i) * group], kLog2E, score);
        }
      }
    }
  }
}

__device__ __forceinline__ void scale_all(float (&numbers)[2][2][4], float scale) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) numbers[m][n][e] *= scale;
    }
  }
}

// Of queries and keys that are not both there.
__device__ __forceinline__ void clear_absent(uint32_t queries_there, uint32_t keys_there, float (&weights)[2][2][4],
                                             float (&d_scores)[2][2][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool is_there =
            (queries_there >> (n * 8 + 2 * t + e % 2) & 1u) != 0 && (keys_there >> (m * 16 + e / 2 * 8 + g) & 1u) != 0;
        if (!is_there) weights[m][n][e] = d_scores[m][n][e] = 0.0f;
      }
    }
  }
}

// Step 3 of a warp's 32 keys and the 16 queries from `column` on in the stage, `number` in the unit.
template <typename Element, typename Shared, int kSteps, int kN>
__device__ __forceinline__ void differentiate_unit(const GridBackwardArguments& args, Shared& shared, int stage,
                                                   const KeysOfWarp<kSteps>& mine, int column, uint32_t number,
                                                   uint32_t there, float (&grad_key)[2][kN][4],
                                                   float (&grad_value)[2][kN][4]) {
  using KeyTile = typename Shared::KeyTile;
  using QueryTile = typename Shared::QueryTile;
  constexpr uint32_t kGradOut = sizeof(QueryTile);  // behind queries
  const uint32_t bytes_on = static_cast<uint32_t>(stage) * sizeof(typename Shared::Stage) +
                            static_cast<uint32_t>(column) * QueryTile::kChunks * 16;
  const cuda::SharedRow right = cuda::moved(mine.queries, 0, bytes_on);
  const int t = lane_id() % 4, first_term = static_cast<int>(number % Shared::kTerms) + 2 * t;
  float weights[2][2][4], d_scores[2][2][4];
  cuda::fill(weights, 0.0f);
  cuda::multiply_all_rows<KeyTile, QueryTile, Element>(weights, mine.keys, right);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[m][n][e] = cuda::scale_score(weights[m][n][e], args.score_scale);
        d_scores[m][n][e] = shared.minus_shift[first_term + n * 8 + e % 2];
      }
    }
  }
  if (args.bias != nullptr) {
    add_unit_bias(args, shared.head, mine.first_key, mine.there, number, there, weights);
  }
  // Exponentials between products.
  uint32_t rows[kSteps][4];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    cuda::load_matrix_x4(rows[k], QueryTile::further_here(right, k * 2, 0, kGradOut));
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      cuda::multiply_accumulate<Element>(d_scores[m][0], mine.values[k][m], rows[k][0], rows[k][1]);
      cuda::multiply_accumulate<Element>(d_scores[m][1], mine.values[k][m], rows[k][2], rows[k][3]);
    }
#pragma unroll
    for (int i = k * 16 / kSteps; i < (k + 1) * 16 / kSteps; ++i) {
      const int n = i / 4 % 2, query = first_term + n * 8 + i % 2;
      float& weight = weights[i / 8][n][i % 4];
      weight = cuda::exp2_approximate(weight - shared.largest[query]) * shared.factor[query];
    }
  }
  const cuda::SharedRow first_columns = cuda::moved(mine.query_columns, 0, bytes_on);
  uint32_t columns[kN / 2][4];
  load_columns<QueryTile>(columns, first_columns, 0, kGradOut);
  if (there != 0xffffu || mine.there != 0xffffffffu) {
    clear_absent(there, mine.there, weights, d_scores);
  }
  uint32_t left[2][4];
  pack_left<Element>(left, weights, 0);
  add_products<Element>(grad_value, left, columns);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d_scores[m][n][e] *= weights[m][n][e];
    }
  }
  if (args.d_score_scale != 1.0f) scale_all(d_scores, args.d_score_scale);
  pack_left<Element>(left, d_scores, 0);
  if (args.grad_query.data != nullptr) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int exchanged = ((column / 8 + n) ^ (lane_id() / 4)) * KeyTile::kPerChunk;
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        Element* to = shared.d_scores.elements + mine.first_d_score + exchanged + h * 8 * KeyTile::kColumns;
        *reinterpret_cast<uint32_t*>(to) = left[h / 2][n * 2 + h % 2];
      }
    }
  }
  load_columns<QueryTile>(columns, first_columns, 0);
  add_products<Element>(grad_key, left, columns);
}

// Step 4: the warp's 16 queries and half of head_dim, written by way of the stage's queries, which nobody else reads.
template <typename Element, typename Shared>
__device__ __forceinline__ void write_query_gradients(const GridBackwardArguments& args, Shared& shared,
                                                      typename Shared::Stage& stage, uint32_t first_query) {
  using KeyTile = typename Shared::KeyTile;
  constexpr int kColumns = KeyTile::kColumns / 2;
  const GridGeometry& geometry = args.geometry;
  const int thread = cuda::thread_index_here(), warp = thread / kLanes, lane = thread % kLanes;
  const int first_row = warp % 4 * 16, first_column = warp / 4 * kColumns;
  if (queries_there(shared, first_query + static_cast<uint32_t>(first_row)) == 0) return;
  float sums[1][kColumns / 8][4];
  cuda::fill(sums, 0.0f);
  cuda::SharedRow left = cuda::left_transposed_operand(shared.d_scores, first_row);
  cuda::SharedRow right = cuda::right_operand_by_columns(shared.keys, first_column);
  // Rows of keys that are not there are zeros in both tiles.
#pragma unroll 1
  for (uint32_t key = 0; key < geometry.max_tokens; key += 64) {
    cuda::multiply_steps<Element, 4>(sums, [&](int k, cuda::Operands<1, kColumns / 8>& operands) {
      cuda::load_matrix_x4_transposed(operands.left[0], KeyTile::further(left, 0, k * 16));
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        cuda::load_matrix_x4_transposed(operands.right[n], KeyTile::further(right, n * 2, k * 16));
      }
    });
    left = KeyTile::further(left, 0, 64);
    right = KeyTile::further(right, 0, 64);
  }
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      cuda::store_pair(stage.query, first_row + h * 8 + g, first_column + n * 8 + 2 * t,
                       sums[0][n][2 * h] * args.gradient_scale, sums[0][n][2 * h + 1] * args.gradient_scale);
    }
  }
  // Publishes the warp's results to its lanes.
  __syncwarp();
  constexpr int kChunks = kColumns / KeyTile::kPerChunk;
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += kLanes) {
    const int row = first_row + i / kChunks, chunk = first_column / KeyTile::kPerChunk + i % kChunks;
    const TokenOfUnit token =
        token_of_unit(geometry, shared.num_rows, shared.num_columns, first_query + static_cast<uint32_t>(row));
    const int column = chunk * KeyTile::kPerChunk;
    if (!token.is_there || column >= geometry.head_dim) continue;
    char* to = shared.grad_query + args.grad_query_steps.to(token);
    if (args.is_query_aligned) {
      *reinterpret_cast<uint4*>(to + chunk * 16) = *reinterpret_cast<const uint4*>(stage.query.chunk(row, chunk));
      continue;
    }
#pragma unroll 1
    for (int c = column; c < min(column + KeyTile::kPerChunk, geometry.head_dim); ++c) {
      reinterpret_cast<Element*>(to)[c] = stage.query.at(row, c);
    }
  }
}

}  // namespace grid

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GridUnitSharedMemory<Element, kHeadDim>::kThreads, 1)
    grid_unit_gradients(const GridBackwardArguments args) {
  using Shared = GridUnitSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens, kQueries = Shared::kQueries;
  constexpr int kBytes = sizeof(Element);
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const uint32_t unit_number = blockIdx.x / geometry.num_tiles;
  const uint32_t first_token = (blockIdx.x - unit_number * geometry.num_tiles) * kTokens;
  // Step 1.
  {
    const grid::Unit unit = grid::find_unit(geometry, unit_number);
    if (threadIdx.x == 0) {
      shared.query = grid::first_row_of(args.query, unit, kBytes);
      shared.grad_out = grid::first_row_of(args.grad_out, unit, kBytes);
      if (args.out.data != nullptr) shared.out = grid::first_row_of(args.out, unit, kBytes);
      if (args.grad_query.data != nullptr) {
        shared.grad_query =
            static_cast<char*>(args.grad_query.data) + grid::first_offset_of(args.grad_query, unit, kBytes);
      }
      shared.num_rows = unit.num_rows;
      shared.num_columns = unit.num_columns;
      shared.head = unit.head;
      shared.first_number =
          grid::number_offset(geometry, grid::Token{true, unit.batch, unit.head, unit.first_row, unit.first_column, 0});
    }
    grid::gather_unit_async<Shared::kThreads, 2>(
        geometry, unit.num_rows, unit.num_columns, first_token, {&shared.keys, &shared.d_scores},
        {grid::first_row_of(args.key, unit, kBytes), grid::first_row_of(args.value, unit, kBytes)},
        {args.key_steps, args.value_steps});
    cuda::copy_async_commit();
  }
  // Publishes the unit to all threads, which leave it there: registers are scarce.
  __syncthreads();
  const auto gather_queries = [&](uint32_t query) {
    auto& stage = shared.stages[query / kQueries % 2];
    grid::gather_unit_async<Shared::kThreads, 2>(geometry, shared.num_rows, shared.num_columns, query,
                                                 {&stage.query, &stage.grad_out}, {shared.query, shared.grad_out},
                                                 {args.query_steps, args.grad_out_steps});
    cuda::copy_async_commit();
  };
  gather_queries(0);
  grid::load_unit_terms<Element>(args, shared, 0);
  cuda::copy_async_wait<1>();
  // Publishes keys and values to all warps.
  __syncthreads();
  grid::KeysOfWarp<kHeadDim / 16> mine;
  mine.first_row = warp_id() * 32;
  mine.first_key = first_token + static_cast<uint32_t>(mine.first_row);
  mine.there = grid::tokens_there<32>(geometry, shared.num_rows, shared.num_columns, mine.first_key);
  mine.keys = cuda::left_operand(shared.keys, mine.first_row);
  mine.queries = cuda::right_operand_by_rows(shared.stages[0].query, 0);
  mine.query_columns = cuda::right_operand_by_columns(shared.stages[0].query, 0);
  mine.first_d_score = (mine.first_row + lane_id() / 4) * Shared::KeyTile::kColumns + lane_id() % 4 * 2;
  {
    const cuda::SharedRow left = cuda::left_operand(shared.d_scores, mine.first_row);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        cuda::load_matrix_x4(mine.values[k][m], Shared::KeyTile::further(left, k * 2, m * 16));
      }
    }
  }
  if (mine.there == 0 && args.grad_query.data != nullptr) {
    // Tells the warp's lanes that the values have been taken: d_scores of keys that are not there are zeros.
    __syncwarp();
#pragma unroll 1
    for (int i = lane_id(); i < 32 * Shared::KeyTile::kChunks; i += kLanes) {
      const int row = mine.first_row + i / Shared::KeyTile::kChunks;
      *reinterpret_cast<uint4*>(shared.d_scores.chunk(row, i % Shared::KeyTile::kChunks)) = uint4{0, 0, 0, 0};
    }
  }
  float grad_key[2][kHeadDim / 8][4], grad_value[2][kHeadDim / 8][4];
  cuda::fill(grad_key, 0.0f);
  cuda::fill(grad_value, 0.0f);
#pragma unroll 1
  for (uint32_t first_query = 0; first_query < geometry.max_tokens; first_query += kQueries) {
    // Step 2.
    if (first_query > 0 && first_query % Shared::kTerms == 0) {
      grid::load_unit_terms<Element>(args, shared, first_query);
    }
    cuda::copy_async_wait<0>();
    // Publishes the queries' rows and terms to all warps; tells all threads that the stage before and its d_scores have
    // been used and may be overwritten.
    __syncthreads();
    const uint32_t next_query = first_query + kQueries;
    if (next_query < geometry.max_tokens) gather_queries(next_query);
    const int stage = static_cast<int>(first_query / kQueries % 2);
    if (mine.there != 0) {
#pragma unroll 1
      for (int column = 0; column < static_cast<int>(kQueries); column += 16) {
        const uint32_t number = first_query + static_cast<uint32_t>(column);
        const uint32_t there = grid::queries_there(shared, number);
        if (there == 0) continue;
        grid::differentiate_unit<Element>(args, shared, stage, mine, column, number, there, grad_key, grad_value);
      }
    }
    // Publishes d_scores to all warps; tells them that the stage and its terms have been used.
    __syncthreads();
    if (args.grad_query.data != nullptr) {
      grid::write_query_gradients<Element>(args, shared, shared.stages[stage], first_query);
    }
  }
  // Tells all warps that keys and d_scores have been used and may be overwritten.
  __syncthreads();
  // Step 5.
  if (mine.there == 0) return;
  const grid::Unit unit = grid::find_unit(geometry, blockIdx.x / geometry.num_tiles);
  const grid::TokenOfUnit token =
      grid::token_of_unit(geometry, unit.num_rows, unit.num_columns, mine.first_key + static_cast<uint32_t>(lane_id()));
  const auto rows_of = [&](const MutableImage& image, const grid::TokenSteps& steps) {
    const int64_t first = grid::first_offset_of(image, unit, kBytes);
    return grid::RowsOfLanes{token.is_there ? first + static_cast<int64_t>(steps.to(token)) : grid::kNotThere,
                             mine.first_row};
  };
  const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  grid::write_rows(grad_value, ones, shared.d_scores, mine.first_row, args.grad_second, args.is_second_aligned,
                   rows_of(args.grad_second, args.grad_second_steps), geometry.head_dim);
  const float factors[4] = {args.gradient_scale, args.gradient_scale, args.gradient_scale, args.gradient_scale};
  grid::write_rows(grad_key, factors, shared.keys, mine.first_row, args.grad_first, args.is_first_aligned,
                   rows_of(args.grad_first, args.grad_first_steps), geometry.head_dim);
}

}  // namespace topgather
