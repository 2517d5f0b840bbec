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
  TransposedBias(const GridProblem& problem, const void* bias) : num_tokens_(problem.most_tokens()) {
    if (bias == nullptr) return;
    const int64_t per_head = num_tokens_ * num_tokens_;
    buffer_ = allocate_aligned(static_cast<size_t>(problem.num_heads * per_head) * sizeof(T));
    data_ = reinterpret_cast<T*>(buffer_.get());
    struct Context {
      const T* source;
      T* target;
      int64_t num_tokens;
    } context{static_cast<const T*>(bias), data_, num_tokens_};
    const auto body = [](void* opaque, int64_t task, int) {
      const Context& ctx = *static_cast<Context*>(opaque);
      const int64_t key = task % ctx.num_tokens, head = task / ctx.num_tokens;
      const T* column = ctx.source + head * ctx.num_tokens * ctx.num_tokens + key;
      for (int64_t query = 0; query < ctx.num_tokens; ++query) {
        ctx.target[task * ctx.num_tokens + query] = column[query * ctx.num_tokens] * static_cast<T>(kLog2E);
      }
    };
    parallel_for(useful_threads(problem.num_threads, problem.num_heads, static_cast<double>(per_head)),
                 problem.num_heads * num_tokens_, body, &context);
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
