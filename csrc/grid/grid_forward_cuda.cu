// Grid and window attention forward on CUDA: dense attention inside each group, tokens read where they lie.
//
//   out_i = sum_t softmax_t(scale * dot(query_i, key_t) + bias_it) value_t,   t over the tokens of i's group
//   lse_i = log sum_t exp(scale * dot(query_i, key_t) + bias_it)
//
// Who owns what: a thread block owns a tile of queries of one unit, or of several where groups have 32 tokens or fewer
// (grid_geometry_cuda.cuh); a warp owns 16 of them, with scores and outputs in its registers. grid_attend_large takes
// the groups of a 16-bit type that are larger than a tile: 128 queries of one unit, 32 a warp. Steps:
//   1. place the tile's queries and gather their rows;
//   per tile of keys of the same units:
//   2. gather keys and values;
//   per kForwardStep keys:
//   3. scores in base 2, plus bias; keys that are not there to -inf;
//   4. running maximum and sum per query (online softmax);
//   5. outputs += weights x values;
//   last:
//   6. divide, round, write out, lse and softmax terms.
// Bytes: query and out once, keys and values once per tile of queries, from the second-level cache but for the first; a
// bias is read by every group, from there too. Operations: 4 G D a token, G / 2 a byte of 16-bit memory: bandwidth
// bounds windows and grids of 49 or 64 tokens by far. Of several tiles of keys the next is fetched while one is attended
// to (float32 finds the one after it as well); groups of one tile leave it to the thread blocks of a multiprocessor to
// hide each other's waits.
// Numerics: scores, weights and sums in float32; weights are rounded to a 16-bit element type before they meet the
// values. A row all of whose scores are -inf, or with one of +inf or NaN: NaN, as plain softmax. There is no empty row:
// a token is in its own group.
// Determinism: a row's arithmetic depends on its own group and shapes alone.
#include "../common/softmax_terms.h"
#include "../cuda/scores.cuh"
#include "grid_geometry_cuda.cuh"

namespace topgather {

struct GridForwardArguments {
  GridGeometry geometry;
  float score_scale;  // scale * log2(e)
  bool is_out_aligned;
  grid::TokenSteps query_steps;
  grid::TokenSteps key_steps;
  grid::TokenSteps value_steps;
  grid::TokenSteps out_steps;
  ConstImage query;      // [batch, head, row, column, D] dtype
  ConstImage key;        // [batch, head, row, column, D] dtype
  ConstImage value;      // [batch, head, row, column, D] dtype
  const float* bias;     // [head, G, G] float32, or null
  MutableImage out;      // [batch, head, row, column, D] dtype
  float* lse;            // [batch, head, row, column] float32
  float* softmax_terms;  // [batch, head, row, column, 2] float32
};

template <typename Element, int kTokens, int kHeadDim>
struct GridKeyStage {
  cuda::SharedTile<Element, kTokens, kHeadDim> key;
  cuda::SharedTile<Element, kTokens, kHeadDim> value;
};

// Where the rows of a tile of keys and values lie.
template <int kTokens>
struct GridKeyPlaces {
  grid::RowOffsets<kTokens> key_rows;
  grid::RowOffsets<kTokens> value_rows;
  uint32_t there[kTokens / kLanes];  // a bit a key
};

template <typename Element, int kHeadDim>
struct GridForwardSharedMemory {
  using Tiles = GridTiles<Element, kHeadDim>;
  static constexpr int kTokens = Tiles::kTokens;
  static constexpr int kThreads = Tiles::kWarps * kLanes;
  using Stage = GridKeyStage<Element, kTokens, kHeadDim>;
  using Places = GridKeyPlaces<kTokens>;

  cuda::SharedTile<Element, kTokens, kHeadDim> query;
  // float32 multiplies weights from here; the 16-bit types multiply them from registers.
  cuda::SharedTile<float, Tiles::kIsFloat ? kTokens : 1, Tiles::kForwardStep> weights;
  grid::RowOffsets<kTokens> query_rows;
  grid::RowOffsets<kTokens> out_rows;
  int64_t numbers[kTokens];          // where a query's lse stands
  int64_t bias_rows[kTokens];        // where a query's row of the bias starts
  uint32_t there[kTokens / kLanes];  // a bit a query
  // Of the tile that is attended to, the one that is filled and the one whose keys are found.
  Places places[3];
  // One is attended to while the other is filled. Groups of one tile have the first alone.
  Stage stages[2];
  static constexpr size_t bytes(bool is_single) {
    return sizeof(GridForwardSharedMemory) - (is_single ? sizeof(Stage) : 0);
  }
};

template <typename Element, int kHeadDim>
struct GridLargeSharedMemory {
  using Tiles = GridLargeTiles<kHeadDim>;
  static constexpr int kTokens = Tiles::kTokens;
  static constexpr int kKeys = Tiles::kKeys;
  static constexpr int kThreads = Tiles::kWarps * kLanes;
  using Stage = GridKeyStage<Element, kKeys, kHeadDim>;

  cuda::SharedTile<Element, kTokens, kHeadDim> query;
  Stage stages[2];
  // Of the thread block's unit: the first token's rows, how many tokens there are, its head.
  const char* key_rows;
  const char* value_rows;
  uint32_t num_rows;
  uint32_t num_columns;
  uint32_t head;
  uint32_t first_query;  // of the thread block
};

namespace grid {

// What a warp carries through the keys: outputs, and per row the running maximum and the lane's part of the sum.
template <int kM, int kColumns>
struct Running {
  float out[kM][kColumns / 8][4];
  float maximum[2 * kM];
  float sum[2 * kM];

  __device__ __forceinline__ void reset() {
    cuda::fill(out, 0.0f);
#pragma unroll
    for (int h = 0; h < 2 * kM; ++h) {
      maximum[h] = -INFINITY;
      sum[h] = 0.0f;
    }
  }
};

// Step 3, from products to scores. bias_rows[row]: where a query's row of the bias starts; `there` has a bit a key; first_number: the first key's in its group.
template <typename BiasRows, typename Bits, int kM, int kBlocks>
__device__ __forceinline__ void finish_scores(const GridForwardArguments& args, const BiasRows& bias_rows,
                                              int first_row, uint32_t first_number, Bits there,
                                              float (&scores)[kM][kBlocks][4]) {
  constexpr Bits kAll = ~Bits{0} >> (8 * sizeof(Bits) - kBlocks * 8);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const Bits mine = there >> 2 * t;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = cuda::scale_score(scores[m][n][e], args.score_scale);
    }
  }
  if (args.bias != nullptr) {
#pragma unroll
    for (int h = 0; h < 2 * kM; ++h) {
      const float* bias = args.bias + bias_rows[first_row + h * 8 + g] + first_number + 2 * t;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[h / 2][n][h % 2 * 2 + e];
          if ((mine >> (n * 8 + e) & 1) != 0) score = fmaf(bias[n * 8 + e], kLog2E, score);
        }
      }
    }
  }
  if (there == kAll) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if ((mine >> (n * 8 + e % 2) & 1) == 0) scores[m][n][e] = -INFINITY;
      }
    }
  }
}

// Step 4: scores become weights. is_first: there are no outputs yet.
template <int kM, int kBlocks, int kColumns>
__device__ __forceinline__ void online_softmax(float (&scores)[kM][kBlocks][4], Running<kM, kColumns>& running,
                                               bool is_first) {
  float rescale[2 * kM];
#pragma unroll
  for (int h = 0; h < 2 * kM; ++h) {
    float (&row)[kBlocks][4] = scores[h / 2];
    const int of_row = h % 2 * 2;
    float maximum = row[0][of_row];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      maximum = cuda::max_or_nan(maximum, cuda::max_or_nan(row[n][of_row], row[n][of_row + 1]));
    }
    maximum = cuda::max_or_nan(running.maximum[h], cuda::max_of_row(maximum));
    // Only scores of -inf so far: any finite base keeps -inf - base from being NaN.
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    rescale[h] = cuda::exp2_approximate(running.maximum[h] - base);
    running.maximum[h] = maximum;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = row[n][of_row + e];
        score = cuda::exp2_approximate(score - base);
        sum += score;
      }
    }
    running.sum[h] = running.sum[h] * rescale[h] + sum;
  }
  if (is_first) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) running.out[m][n][e] *= rescale[2 * m + e / 2];
    }
  }
}

// Steps 3 to 5 of a warp for the keys in shared memory, as far as they belong to its slot. `there`: a bit a key.
template <typename Shared, typename Stage, int kColumns>
__device__ __forceinline__ void attend(const GridForwardArguments& args, Shared& shared, Stage& stage,
                                       const uint32_t* there_of_keys, uint32_t key_tile, int first_row,
                                       Running<1, kColumns>& running) {
  constexpr int kStep = Shared::Tiles::kForwardStep;
  const int slot_tokens = args.geometry.slot_tokens, head_dim = args.geometry.head_dim;
  const int first = first_row & -slot_tokens, end = first + slot_tokens;
#pragma unroll 1
  for (int key = first; key < end; key += kStep) {
    const uint32_t there = tokens_there<kStep>(there_of_keys, key, end);
    if (there == 0) continue;
    const int count = kLanes - __clz(static_cast<int>(there));
    float scores[1][kStep / 8][4];
    cuda::fill(scores, 0.0f);
    multiply_rows(scores, shared.query, first_row, stage.key, key, count, head_dim);
    const uint32_t first_number = key_tile * Shared::kTokens + static_cast<uint32_t>(key - first);
    finish_scores(args, shared.bias_rows, first_row, first_number, there, scores);
    online_softmax(scores, running, key_tile == 0 && key == first);
    add_weighted_rows(running.out, scores, stage.value, key, count, head_dim, shared.weights, first_row);
  }
}

// Where the queries of a tile of a unit have their rows of the bias; those that are not there take the last one's.
struct BiasRowsOfUnit {
  int64_t group;  // tokens
  uint32_t head;
  uint32_t first_number;

  __device__ __forceinline__ int64_t operator[](int row) const {
    const int64_t number = min(static_cast<int64_t>(first_number) + row, group - 1);
    return (head * group + number) * group;
  }
};

// The same of a warp's 32 queries for the keys of a stage, all of one unit. `first_query` leads to the queries' rows.
template <typename Element, typename Shared, int kHeadDim>
__device__ __forceinline__ void attend_large(const GridForwardArguments& args, Shared& shared, uint32_t first_key,
                                             int first_row, cuda::SharedRow first_query,
                                             Running<2, kHeadDim>& running) {
  using QueryTile = decltype(Shared::query);
  using KeyTile = decltype(Shared::Stage::key);
  constexpr int kKeys = Shared::kKeys;
  typename Shared::Stage& stage = shared.stages[first_key / kKeys % 2];
  float scores[2][kKeys / 8][4];
  cuda::fill(scores, 0.0f);
  cuda::multiply_all_rows<QueryTile, KeyTile, Element>(scores, first_query, cuda::right_operand_by_rows(stage.key, 0));
  const BiasRowsOfUnit bias_rows{args.geometry.max_tokens, shared.head, shared.first_query};
  const auto there = tokens_there<kKeys>(args.geometry, shared.num_rows, shared.num_columns, first_key);
  finish_scores(args, bias_rows, first_row, first_key, there, scores);
  online_softmax(scores, running, false);
  multiply_all_registers<KeyTile, Element>(running.out, scores, cuda::right_operand_by_columns(stage.value, 0));
}

// A row's lse and softmax terms, which stand at `offset`.
__device__ __forceinline__ void write_terms(const GridForwardArguments& args, int64_t offset, float maximum,
                                            float sum) {
  args.lse[offset] = (maximum + log2f(sum)) * kLn2;
  write_softmax_terms(maximum, sum, args.softmax_terms + 2 * offset);
}

// Step 6 of a warp's 16 rows. number_of(row) is where a query's lse stands, or kNotThere.
template <typename Tile, typename Numbers, typename Offsets, int kHeadDim>
__device__ __forceinline__ void write_outputs(const GridForwardArguments& args, Tile& tile, const Numbers& number_of,
                                              const Offsets& offsets, int first_row,
                                              const Running<1, kHeadDim>& running) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  float factors[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = cuda::sum_of_row(running.sum[h]);
    factors[h] = 1.0f / sum;
    const int64_t offset = number_of(first_row + h * 8 + g);
    if (t == 0 && offset != kNotThere) write_terms(args, offset, running.maximum[h], sum);
  }
  write_rows(running.out, factors, tile, first_row, args.out, args.is_out_aligned, offsets, args.geometry.head_dim);
}

// The same of a warp's 32 rows of a unit: a lane places one of them, and writes its lse and softmax terms.
template <typename Tile, int kHeadDim>
__device__ __forceinline__ void write_large_outputs(const GridForwardArguments& args, Tile& tile, uint32_t number,
                                                    uint32_t first_query, int first_row,
                                                    const Running<2, kHeadDim>& running) {
  const GridGeometry& geometry = args.geometry;
  const Unit unit = find_unit(geometry, number);
  const TokenOfUnit token = token_of_unit(geometry, unit.num_rows, unit.num_columns,
                                          first_query + static_cast<uint32_t>(first_row + lane_id()));
  float factors[4], maximum = 0.0f, sum = 0.0f;
#pragma unroll
  for (int h = 0; h < 4; ++h) {
    const float of_row = cuda::sum_of_row(running.sum[h]);
    factors[h] = 1.0f / of_row;
    // Row h * 8 + g is held by lanes 4 g to 4 g + 3, and written by lane h * 8 + g.
    const float to_maximum = __shfl_sync(kAllLanes, running.maximum[h], lane_id() % 8 * 4);
    const float to_sum = __shfl_sync(kAllLanes, of_row, lane_id() % 8 * 4);
    if (lane_id() / 8 == h) {
      maximum = to_maximum;
      sum = to_sum;
    }
  }
  if (token.is_there) {
    const uint32_t row = unit.first_row + token.row * geometry.rows.token_step;
    const uint32_t column = unit.first_column + token.column * geometry.columns.token_step;
    write_terms(args, number_offset(geometry, Token{true, unit.batch, unit.head, row, column, 0}), maximum, sum);
  }
  const int64_t first_out = first_offset_of(args.out, unit, sizeof(tile.elements[0]));
  const int64_t mine = token.is_there ? first_out + static_cast<int64_t>(args.out_steps.to(token)) : kNotThere;
  write_rows(running.out, factors, tile, first_row, args.out, args.is_out_aligned, RowsOfLanes{mine, first_row},
             geometry.head_dim);
}

}  // namespace grid

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GridForwardSharedMemory<Element, kHeadDim>::kThreads,
                                  GridTiles<Element, kHeadDim>::kForwardBlocksPerProcessor)
    grid_attend(const GridForwardArguments args) {
  using Shared = GridForwardSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens;
  constexpr int kBytes = sizeof(Element);
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  // Other kernels take the larger groups of 16-bit types.
  const uint32_t num_tiles = Shared::Tiles::kIsFloat ? geometry.num_tiles : 1;
  const bool is_single = num_tiles == 1;
  const uint32_t block = blockIdx.x / num_tiles, tile = blockIdx.x - block * num_tiles;
  const uint32_t first_unit = block * (kTokens / static_cast<uint32_t>(geometry.slot_tokens));
  const auto unit_of = [first_unit](uint32_t slot) { return first_unit + slot; };
  const auto place_key = [&](typename Shared::Places& places, int i, const grid::Token& token) {
    places.key_rows[i] = grid::row_offset(args.key, token, kBytes);
    places.value_rows[i] = grid::row_offset(args.value, token, kBytes);
  };
  const auto gather_keys = [&](typename Shared::Stage& stage, const typename Shared::Places& places) {
    grid::gather_rows_async<Shared::kThreads>(stage.key, args.key, places.key_rows, geometry.head_dim);
    grid::gather_rows_async<Shared::kThreads>(stage.value, args.value, places.value_rows, geometry.head_dim);
    cuda::copy_async_commit();
  };
  const auto find_keys = [&](uint32_t key_tile) {
    typename Shared::Places& places = shared.places[key_tile % 3];
    grid::find_tokens<kTokens>(geometry, unit_of, key_tile * kTokens, places.there,
                               [&](int i, const grid::Token& token) { place_key(places, i, token); });
  };
  // Step 1. Tiles of short groups may be empty: such thread blocks return as a whole.
  const auto place_query = [&](int i, const grid::Token& token) {
    shared.query_rows[i] = grid::row_offset(args.query, token, kBytes);
    shared.out_rows[i] = grid::row_offset(args.out, token, kBytes);
    shared.numbers[i] = grid::number_offset(geometry, token);
    const int64_t group = geometry.max_tokens;
    shared.bias_rows[i] = (token.head * group + token.number) * group;
    if (is_single) place_key(shared.places[0], i, token);
  };
  if (!grid::place_tokens<kTokens>(geometry, unit_of, tile * kTokens, shared.there, place_query)) return;
  grid::gather_rows_async<Shared::kThreads>(shared.query, args.query, shared.query_rows, geometry.head_dim);
  // Step 2. Keys of a tile are found two tiles ahead, and copied one ahead.
  if (!is_single) {
    find_keys(0);
    find_keys(1);
    // Publishes the places of both tiles to all threads.
    __syncthreads();
  }
  gather_keys(shared.stages[0], shared.places[0]);
  const int first_row = warp_id() * cuda::kBlockRows;
  const bool has_work = grid::tokens_there<16>(shared.there, first_row, Shared::kTokens) != 0;
  grid::Running<1, kHeadDim> running;
  running.reset();
#pragma unroll 1
  for (uint32_t key_tile = 0; key_tile < num_tiles; ++key_tile) {
    typename Shared::Stage& stage = shared.stages[key_tile % 2];
    cuda::copy_async_wait<0>();
    // Publishes keys and values, the next tile's places, and the first time queries, to all warps; tells all threads that
    // the tile before has been used and the next one may overwrite it.
    __syncthreads();
    if (key_tile + 1 < num_tiles) {
      gather_keys(shared.stages[(key_tile + 1) % 2], shared.places[(key_tile + 1) % 3]);
      if (key_tile + 2 < num_tiles) find_keys(key_tile + 2);
    }
    const uint32_t* there = is_single ? shared.there : shared.places[key_tile % 3].there;
    if (has_work) grid::attend(args, shared, stage, there, key_tile, first_row, running);
  }
  if (!has_work) return;
  const auto number_of = [&](int row) {
    return grid::is_token_there(shared.there, row) ? shared.numbers[row] : grid::kNotThere;
  };
  grid::write_outputs(args, shared.query, number_of, shared.out_rows, first_row, running);
}

// Groups of more tokens than a tile has, 16-bit types: a thread block owns 128 queries of a unit, a warp 32 of them, so
// that what it loads of keys and values meets twice as many.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GridLargeSharedMemory<Element, kHeadDim>::kThreads,
                                  GridLargeTiles<kHeadDim>::kBlocksPerProcessor)
    grid_attend_large(const GridForwardArguments args) {
  using Shared = GridLargeSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens, kKeys = Shared::kKeys;
  constexpr int kBytes = sizeof(Element);
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const uint32_t number = blockIdx.x / geometry.num_tiles;
  const uint32_t first_query = (blockIdx.x - number * geometry.num_tiles) * kTokens;
  // Step 1.
  {
    const grid::Unit unit = grid::find_unit(geometry, number);
    if (threadIdx.x == 0) {
      shared.key_rows = grid::first_row_of(args.key, unit, kBytes);
      shared.value_rows = grid::first_row_of(args.value, unit, kBytes);
      shared.num_rows = unit.num_rows;
      shared.num_columns = unit.num_columns;
      shared.head = unit.head;
      shared.first_query = first_query;
    }
    grid::gather_unit_async<Shared::kThreads, 1>(geometry, unit.num_rows, unit.num_columns, first_query,
                                                 {&shared.query}, {grid::first_row_of(args.query, unit, kBytes)},
                                                 {args.query_steps});
  }
  // Publishes the unit to all threads, which leave it there: registers are scarce.
  __syncthreads();
  const auto gather_keys = [&](uint32_t first_key) {
    typename Shared::Stage& stage = shared.stages[first_key / kKeys % 2];
    grid::gather_unit_async<Shared::kThreads, 2>(geometry, shared.num_rows, shared.num_columns, first_key,
                                                 {&stage.key, &stage.value}, {shared.key_rows, shared.value_rows},
                                                 {args.key_steps, args.value_steps});
    cuda::copy_async_commit();
  };
  // Step 2. Keys are copied one stage ahead.
  gather_keys(0);
  const int first_row = warp_id() * 2 * cuda::kBlockRows;
  const uint32_t there = grid::tokens_there<32>(geometry, shared.num_rows, shared.num_columns,
                                                first_query + static_cast<uint32_t>(first_row));
  const bool has_work = there != 0;
  const cuda::SharedRow query_rows = cuda::left_operand(shared.query, first_row);
  grid::Running<2, kHeadDim> running;
  running.reset();
#pragma unroll 1
  for (uint32_t first_key = 0; first_key < geometry.max_tokens; first_key += kKeys) {
    cuda::copy_async_wait<0>();
    // Publishes keys and values, and the first time queries, to all warps; tells all threads that the stage before has
    // been used and may be overwritten.
    __syncthreads();
    if (first_key + kKeys < geometry.max_tokens) gather_keys(first_key + kKeys);
    if (has_work) grid::attend_large<Element>(args, shared, first_key, first_row, query_rows, running);
  }
  if (has_work) grid::write_large_outputs(args, shared.query, number, first_query, first_row, running);
}

namespace {

// A kernel as it is launched for groups of some size.
struct GridForwardWay {
  const char* name;
  int64_t tokens;
  int64_t threads;
  int64_t shared_bytes;
  void (*launch)(const GridForwardArguments& args, const cuda::LaunchShape& shape);
};

struct GridForwardKernel {
  Dtype dtype;
  int64_t max_head_dim;
  GridForwardWay of_one_tile;  // of its tokens
  GridForwardWay of_several;
};

template <typename Shared, void (*kKernel)(GridForwardArguments)>
constexpr GridForwardWay forward_way(const char* name, size_t shared_bytes) {
  static_assert(sizeof(Shared) <= 99 * 1024, "one table for all architectures");
  return {name, Shared::kTokens, Shared::kThreads, static_cast<int64_t>(shared_bytes),
          [](const GridForwardArguments& args, const cuda::LaunchShape& shape) { cuda::launch(kKernel, shape, args); }};
}

template <typename Element, int kHeadDim>
constexpr GridForwardKernel forward_kernel() {
  using Shared = GridForwardSharedMemory<Element, kHeadDim>;
  const auto of = [](bool is_single) {
    return forward_way<Shared, grid_attend<Element, kHeadDim>>(is_single ? "grid_attend, one tile" : "grid_attend",
                                                               Shared::bytes(is_single));
  };
  if constexpr (Shared::Tiles::kIsFloat) {
    return {kDtypeOf<Element>, kHeadDim, of(true), of(false)};
  } else {
    using Large = GridLargeSharedMemory<Element, kHeadDim>;
    return {kDtypeOf<Element>, kHeadDim, of(true),
            forward_way<Large, grid_attend_large<Element, kHeadDim>>("grid_attend_large", sizeof(Large))};
  }
}

constexpr GridForwardKernel kForwardKernels[] = {forward_kernel<BFloat16, 64>(), forward_kernel<BFloat16, 128>(),
                                                 forward_kernel<Float16, 64>(),  forward_kernel<Float16, 128>(),
                                                 forward_kernel<float, 64>(),    forward_kernel<float, 128>()};

}  // namespace

void grid_forward_cuda(const GridForwardParams& params, const CudaWorkspace&, const CudaPlace& place) {
  const GridProblem& problem = params.problem;
  const GridForwardKernel& kernel = grid::kernel_for(kForwardKernels, problem);
  if (grid::is_empty(problem)) return;
  const DeviceGuard guard(place.device);
  const StageRange range("grid.forward");
  const bool is_single = problem.max_tokens() <= kernel.of_one_tile.tokens;
  const GridForwardWay& way = is_single ? kernel.of_one_tile : kernel.of_several;
  GridForwardArguments args{};
  args.geometry = grid::geometry_of(problem, way.tokens);
  args.score_scale = static_cast<float>(problem.scale) * grid::kLog2E;
  args.is_out_aligned = grid::has_whole_chunks(params.out);
  args.query_steps = grid::token_steps(problem, params.query);
  args.key_steps = grid::token_steps(problem, params.key);
  args.value_steps = grid::token_steps(problem, params.value);
  args.out_steps = grid::token_steps(problem, params.out);
  args.query = params.query;
  args.key = params.key;
  args.value = params.value;
  args.bias = params.bias.at<float>();
  args.out = params.out;
  args.lse = params.lse.at<float>();
  args.softmax_terms = params.softmax_terms.at<float>();
  way.launch(args, {grid::blocks_for(args.geometry, way.tokens), dim3(static_cast<unsigned>(way.threads)),
                    static_cast<size_t>(way.shared_bytes), static_cast<cudaStream_t>(place.stream)});
}

void grid::add_forward_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const GridForwardKernel& kernel : kForwardKernels) {
    for (const GridForwardWay& way : {kernel.of_one_tile, kernel.of_several}) {
      facts.push_back({way.name, kernel.dtype, kernel.max_head_dim, way.threads, way.shared_bytes});
    }
  }
}

}  // namespace topgather
