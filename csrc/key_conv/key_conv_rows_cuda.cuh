// Rows of keys as threads of the key convolution hold them, and the sequences they belong to.
//
// A thread owns kVector neighbouring channels of a head.
#pragma once

#include "../common/checks.h"
#include "../cuda/dispatch.h"
#include "../cuda/launch.cuh"
#include "../cuda/rounding.h"
#include "../cuda/tile_math.cuh"
#include "key_conv_config_cuda.h"
#include "key_conv_params.h"

namespace topgather {

constexpr int kKeyConvThreads = KeyConvCudaConfig::kThreads;
constexpr float kKeyConvLog2E = 1.44269504088896340736f;

// kVector elements of a row as they are stored; a single element as float32. Zeros are zeros of every type.
template <typename Element, int kVector>
struct Channels {
  static constexpr int kWords = kVector == 1 ? 1 : kVector * static_cast<int>(sizeof(Element)) / 4;
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "what one load brings");
  uint32_t words[kWords] = {};

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }

  __device__ __forceinline__ void load(const Element* source) {
    if constexpr (kVector == 1) {
      words[0] = __float_as_uint(cuda::to_float(*source));
    } else if constexpr (kWords == 2) {
      const uint2 loaded = *reinterpret_cast<const uint2*>(source);
      words[0] = loaded.x;
      words[1] = loaded.y;
    } else {
      const uint4 loaded = *reinterpret_cast<const uint4*>(source);
      words[0] = loaded.x;
      words[1] = loaded.y;
      words[2] = loaded.z;
      words[3] = loaded.w;
    }
  }

  __device__ __forceinline__ void unpack(float (&values)[kVector]) const {
    if constexpr (kVector == 1 || sizeof(Element) == 4) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) values[i] = __uint_as_float(words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const float2 pair = cuda::unpack2<Element>(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
      }
    }
  }

  static __device__ __forceinline__ void store(const float (&values)[kVector], Element* target) {
    if constexpr (kVector == 1) {
      *target = cuda::from_float<Element>(values[0]);
    } else if constexpr (kWords == 4) {
      *reinterpret_cast<uint4*>(target) = cuda::pack_chunk<Element>(values);
    } else {
      *reinterpret_cast<uint2*>(target) = {cuda::pack2<Element>(values[0], values[1]),
                                           cuda::pack2<Element>(values[2], values[3])};
    }
  }
};

// The problem as every kernel takes it.
struct KeyConvShape {
  uint32_t num_heads;
  uint32_t num_vectors;  // of a row
  int32_t head_dim;
  int32_t width;
  int64_t num_tokens;
  const int64_t* cu_seqlens;  // [num_sequences + 1] int64, or null for a dense problem
  int64_t num_sequences;
};

// Rows [start, end). What is found for a token of no sequence does not have it.
struct KeySequence {
  int64_t start;
  int64_t end;

  __device__ __forceinline__ bool has(int64_t token) const { return token >= start && token < end; }
};

// The sequence of a token: the last that starts at or before it. Boundaries that do not ascend lead to some sequence or
// none, never outside.
__device__ __forceinline__ KeySequence sequence_of(const KeyConvShape& shape, int64_t token) {
  if (shape.cu_seqlens == nullptr) return {0, shape.num_tokens};
  int64_t low = 0, high = shape.num_sequences;  // starts[low - 1] <= token < starts[high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (shape.cu_seqlens[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0 || token < 0 || token >= shape.num_tokens) return {token, token};
  const int64_t start = shape.cu_seqlens[low - 1], end = shape.cu_seqlens[low];
  return {start < 0 ? 0 : start, end < shape.num_tokens ? end : shape.num_tokens};
}

// Where a thread's channels stand.
struct KeyPlace {
  int64_t batch;
  int64_t head;
  int32_t column;
};

// A row of keys; before the first the state's, and zeros where there is none of either.
template <typename Element, int kVector>
__device__ __forceinline__ void load_key(const KeyConvShape& shape, const Array<const void, 4>& key,
                                         const Array<const void, 4>& state, const KeyPlace& place, int64_t row,
                                         Channels<Element, kVector>& channels) {
  channels.clear();
  if (row >= 0) {
    if (row < shape.num_tokens) {
      channels.load(key.at<Element>(place.batch, place.head, row) + place.column);
    }
  } else if (state.data != nullptr && row >= 1 - shape.width) {
    channels.load(state.at<Element>(place.batch, place.head, row + shape.width - 1) + place.column);
  }
}

// taps[l] belongs to the key l tokens back. kWidth: the kernel's width, 0 where it is known at run time alone.
template <int kWidth, int kTaps, int kVector>
__device__ __forceinline__ void load_taps(const KeyConvShape& shape, const float* weight, const KeyPlace& place,
                                          float (&taps)[kTaps][kVector]) {
  static_assert(kWidth == 0 || kWidth == kTaps);
  const int width = kWidth > 0 ? kWidth : shape.width;
  const float* source = weight + (place.head * shape.head_dim + place.column) * width;
#pragma unroll
  for (int l = 0; l < kTaps; ++l) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      taps[l][c] = l < width ? source[c * width + width - 1 - l] : 0.0f;
    }
  }
}

// Zeros without one.
template <int kVector>
__device__ __forceinline__ void load_bias(const KeyConvShape& shape, const float* bias, const KeyPlace& place,
                                          float (&numbers)[kVector]) {
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    numbers[c] = bias == nullptr ? 0.0f : bias[place.head * shape.head_dim + place.column + c];
  }
}

__device__ __forceinline__ float sigmoid(float x) {
  return cuda::reciprocal_approximate(1.0f + cuda::exp2_approximate(x * -kKeyConvLog2E));
}

// --- host -----------------------------------------------------------------------------------------------------------

constexpr int kKeyConvMaxTaps = 8;
// Up to so many, instances of their own for rows that are vectors. Rows without vectors are slow either way: they have
// one instance for all, which knows of options.
constexpr int kFewTaps = 4;
// The widest with an instance of its own for dense problems: each takes seconds to compile, and models use 3 to 5.
constexpr int kMaxDenseWidth = 5;

// Calls `function` with the width, 2 to kMaxWidth, as a compile-time constant.
template <int kMaxWidth, int kWidth = 2, typename Function>
auto with_width(int64_t width, Function function) {
  if constexpr (kWidth < kMaxWidth) {
    if (width != kWidth) return with_width<kMaxWidth, kWidth + 1>(width, function);
  }
  require(width == kWidth, "key_conv: a kernel width that no kernel is there for");
  return function(std::integral_constant<int, kWidth>{});
}

inline bool key_conv_is_empty(const KeyConvProblem& problem) {
  return problem.batch_size == 0 || problem.num_heads == 0 || problem.num_tokens == 0;
}

inline KeyConvShape key_conv_shape(const KeyConvProblem& problem, int64_t vector) {
  require(problem.num_heads <= INT32_MAX && problem.head_dim * problem.kernel_width <= INT32_MAX,
          "key_conv: heads and head_dim are too large for CUDA");
  return {static_cast<uint32_t>(problem.num_heads),
          static_cast<uint32_t>(divide_up(problem.head_dim, vector)),
          static_cast<int32_t>(problem.head_dim),
          static_cast<int32_t>(problem.kernel_width),
          problem.num_tokens,
          problem.cu_seqlens.data,
          problem.num_sequences};
}

}  // namespace topgather
