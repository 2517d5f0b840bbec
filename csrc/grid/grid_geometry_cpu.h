// One group of one head as the CPU kernels see it: where its tokens lie.
#pragma once

#include "../common/cache_size.h"
#include "../cpu/convert.h"
#include "../cpu/fresh_pages.h"
#include "../cpu/tile_gemm.h"
#include "grid_config.h"
#include "grid_params.h"

namespace topgather::TOPGATHER_CPU_TARGET {

struct Group {
  int64_t batch_idx;
  int64_t head_idx;
  int64_t first_row;
  int64_t first_column;
  int64_t num_columns;  // tokens of the group along a row of it
  int64_t num_tokens;
};

inline Group group_at(const GridProblem& problem, int64_t batch_idx, int64_t head_idx, int64_t group_idx) {
  const int64_t row_group = group_idx / problem.columns.num_groups;
  const int64_t column_group = group_idx % problem.columns.num_groups;
  const int64_t num_columns = problem.columns.tokens_of(column_group);
  return {batch_idx,
          head_idx,
          row_group * problem.rows.group_step,
          column_group * problem.columns.group_step,
          num_columns,
          problem.rows.tokens_of(row_group) * num_columns};
}

// Groups of all heads in an order in which neighbours share pages and cache lines: heads of a group side by side where
// a token's heads are (a fused projection), else a head's groups, which interleave.
inline Group unit_at(const GridProblem& problem, const ConstImage& query, int64_t unit) {
  const int64_t num_heads = problem.num_heads, num_groups = problem.num_groups();
  const int64_t batch_idx = unit / (num_heads * num_groups), rest = unit % (num_heads * num_groups);
  if (query.strides[1] < query.strides[3]) {
    return group_at(problem, batch_idx, rest % num_heads, rest / num_heads);
  }
  return group_at(problem, batch_idx, rest / num_groups, rest % num_groups);
}

// Calls run(group, following) for the groups group_of(i), first <= i < last; the last has no following one, null.
template <typename GroupOf, typename Run>
inline void for_each_with_next(int64_t first, int64_t last, const GroupOf& group_of, const Run& run) {
  if (first >= last) return;
  Group group = group_of(first);
  for (int64_t i = first + 1; i < last; ++i) {
    const Group following = group_of(i);
    run(group, &following);
    group = following;
  }
  run(group, nullptr);
}

// Elements between neighbouring tokens of a group, along a row of it and from row to row, and the group's first token.
template <typename Element>
struct GroupRows {
  Element* first;
  int64_t row_step;
  int64_t column_step;

  Element* at(int64_t row, int64_t column) const { return first + row * row_step + column * column_step; }
  // For walking through all tokens: visit(token, pointer).
  template <typename Visit>
  void for_each(const Group& group, int64_t begin, int64_t end, const Visit& visit) const {
    int64_t row = begin / group.num_columns, column = begin % group.num_columns;
    for (int64_t token = begin; token < end; ++token) {
      visit(token, at(row, column));
      if (++column == group.num_columns) {
        column = 0;
        ++row;
      }
    }
  }
};

template <typename Element, typename Image>
inline GroupRows<Element> rows_in(const GridProblem& problem, const Image& image, const Group& group) {
  Element* data = image.template at<std::remove_const_t<Element>>(group.batch_idx, group.head_idx, group.first_row,
                                                                  group.first_column);
  return {data, problem.rows.token_step * image.strides[2], problem.columns.token_step * image.strides[3]};
}

// The same for one number a token, laid out [batch, head, row, column].
template <typename Element>
inline GroupRows<Element> numbers_in(const GridProblem& problem, Element* data, const Group& group) {
  const int64_t rows = problem.rows.size, columns = problem.columns.size;
  data += ((group.batch_idx * problem.num_heads + group.head_idx) * rows + group.first_row) * columns;
  return {data + group.first_column, problem.rows.token_step * columns, problem.columns.token_step};
}

// Before results are written, which are dense, a group's rows lying all over them.
template <typename Storage>
inline void populate_image(const GridProblem& problem, const MutableImage& image) {
  const int64_t num_rows = problem.batch_size * problem.num_heads * problem.rows.size * problem.columns.size;
  populate_if_fresh(image.at<Storage>(), num_rows * problem.head_dim * static_cast<int64_t>(sizeof(Storage)),
                    problem.num_threads);
}

// Whether results are stored past the caches: rows of whole, aligned lines that need no conversion, where a call's
// images, num_images in all, do not fit the last-level cache. What is written through it there is read from memory first,
// and evicts what the call reads; of 16-bit numbers half as much, which gained nothing (docs/performance.md).
template <typename Storage>
inline bool streams_results(const GridProblem& problem, int64_t num_images, const MutableImage* const* results,
                            int num_results) {
  if constexpr (!kStreamsLines || !std::is_same_v<Storage, ComputeOf<Storage>>) return false;
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Storage));
  const int64_t num_rows = problem.batch_size * problem.num_heads * problem.rows.size * problem.columns.size;
  const int64_t row_bytes = problem.head_dim * static_cast<int64_t>(sizeof(Storage));
  bool are_lines = problem.head_dim % kLine == 0;
  for (int i = 0; i < num_results; ++i) {
    are_lines = are_lines && bit_cast<int64_t>(results[i]->data) % 64 == 0;
    for (int axis = 0; axis < 4; ++axis) are_lines = are_lines && results[i]->strides[axis] % kLine == 0;
  }
  return are_lines && num_images * num_rows * row_bytes > last_level_cache_bytes();
}

// Prefetches a group's tokens: scattered rows are too irregular for the hardware prefetcher. A few at a time, since a
// processor has a bounded number of outstanding loads and stalls on more.
template <typename Element, int kNumImages>
class TokensAhead {
 public:
  TokensAhead() = default;
  template <typename Image>
  TokensAhead(const GridProblem& problem, const Group& group, const Image* const (&images)[kNumImages])
      : group_(group), head_dim_(problem.head_dim) {
    for (int i = 0; i < kNumImages; ++i) rows_[i] = rows_in<Element>(problem, *images[i], group);
  }

  // The next `count` tokens, if there are any left; for writing where the element may be written.
  void prefetch(int64_t count) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Element));
    for (; count > 0 && token_ < group_.num_tokens; --count, ++token_) {
      for (const GroupRows<Element>& rows : rows_) {
        Element* row = rows.at(row_, column_);
        for (int64_t d = 0; d < head_dim_; d += kLine) prefetch_second_level(row + d);
      }
      if (++column_ == group_.num_columns) {
        column_ = 0;
        ++row_;
      }
    }
  }

 private:
  Group group_{};
  GroupRows<Element> rows_[kNumImages] = {};
  int64_t head_dim_ = 0;
  int64_t token_ = 0;
  int64_t row_ = 0;
  int64_t column_ = 0;
};

// Tokens of a group that each call of prefetch() fetches. Every tile of the group has num_by_queries products as wide
// as its queries and num_by_channels as wide as a row; their rows are a tile's keys or queries.
template <typename T>
inline int64_t tokens_per_prefetch(int64_t num_tokens, int64_t padded_dim, int64_t num_by_queries,
                                   int64_t num_by_channels) {
  const int64_t rows = min64(num_tokens, min64(GridConfig::kTileQueries, GridConfig::kTileKeys));
  const int64_t calls = num_by_queries * ceil_div(rows, rows_at_once<T>(round_up(rows, kLanes<T>))) +
                        num_by_channels * ceil_div(rows, rows_at_once<T>(padded_dim));
  const int64_t tiles = ceil_div(num_tokens, GridConfig::kTileQueries) * ceil_div(num_tokens, GridConfig::kTileKeys);
  return ceil_div(num_tokens, tiles * calls);
}

// tile[i * tile_row + d] for tokens [begin, end), zero from depth to padded_depth.
template <typename Storage>
inline void gather_tokens(const GroupRows<const Storage>& rows, const Group& group, int64_t begin, int64_t end,
                          int64_t depth, int64_t padded_depth, ComputeOf<Storage>* tile) {
  rows.for_each(group, begin, end, [&](int64_t token, const Storage* source) {
    ComputeOf<Storage>* target = tile + (token - begin) * padded_depth;
    load_row(source, depth, target);
    for (int64_t d = depth; d < padded_depth; ++d) target[d] = 0;
  });
}

// A dense tile of tokens [begin, begin + count), transposed: tile[d * tile_row + i].
template <typename Storage>
inline void gather_token_columns(const GroupRows<const Storage>& rows, const Group& group, int64_t begin, int64_t count,
                                 int64_t depth, ComputeOf<Storage> factor, ComputeOf<Storage>* tile, int64_t tile_row) {
  const Storage* tokens[GridConfig::kTileQueries];
  rows.for_each(group, begin, begin + count, [&](int64_t token, const Storage* row) { tokens[token - begin] = row; });
  gather_rows_transposed<Storage>([&](int64_t i) { return tokens[i]; }, count, depth, factor, tile, tile_row);
}

// Where each token of the group stands in a bias, whose groups all have max_tokens.
inline void write_bias_indices(const GridProblem& problem, const Group& group, int32_t* indices) {
  for (int64_t token = 0; token < group.num_tokens; ++token) {
    indices[token] =
        static_cast<int32_t>(token / group.num_columns * problem.columns.max_tokens + token % group.num_columns);
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
