// The bias as the CPU kernels add it: transposed, since queries stand in vector lanes, and in base 2.
#pragma once

#include "../common/parallel.h"
#include "../cpu/math.h"
#include "grid_params.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// [head, key, query] in base 2, or nothing where there is no bias.
template <typename T>
class TransposedBias {
 public:
  TransposedBias(const GridProblem& problem, const void* bias) : num_tokens_(problem.max_tokens()) {
    if (bias == nullptr) return;
    const int64_t per_head = num_tokens_ * num_tokens_;
    buffer_ = allocate_aligned(static_cast<size_t>(problem.num_heads * per_head) * sizeof(T));
    data_ = reinterpret_cast<T*>(buffer_.get());
    const int num_workers = useful_threads(problem.num_threads, problem.num_heads, static_cast<double>(per_head));
    for_each_task(num_workers, problem.num_heads * num_tokens_, [&](int64_t task, int) {
      const int64_t num_tokens = num_tokens_;
      const int64_t key = task % num_tokens, head = task / num_tokens;
      const T* column = static_cast<const T*>(bias) + head * per_head + key;
      T* row = data_ + task * num_tokens;
      for (int64_t query = 0; query < num_tokens; ++query) {
        row[query] = column[query * num_tokens] * static_cast<T>(kLog2E);
      }
    });
  }

  bool exists() const { return data_ != nullptr; }
  const T* row(int64_t head, int64_t key) const { return data_ + (head * num_tokens_ + key) * num_tokens_; }

 private:
  int64_t num_tokens_;
  AlignedBuffer buffer_;
  T* data_ = nullptr;
};

// Adds it to scores [num_keys, tile_row] of keys [first_key, first_key + num_keys).
template <typename T>
inline void add_bias(const TransposedBias<T>& bias, int64_t head, const int32_t* query_indices,
                     const int32_t* key_indices, int64_t num_queries, int64_t num_keys, T* scores, int64_t tile_row) {
  const bool is_contiguous = query_indices[num_queries - 1] - query_indices[0] == num_queries - 1;
  for (int64_t key = 0; key < num_keys; ++key) {
    const T* row = bias.row(head, key_indices[key]);
    T* target = scores + key * tile_row;
    if (is_contiguous) {
      row += query_indices[0];
      for (int64_t i = 0; i < num_queries; ++i) target[i] += row[i];
    } else {
      for (int64_t i = 0; i < num_queries; ++i) target[i] += row[query_indices[i]];
    }
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
