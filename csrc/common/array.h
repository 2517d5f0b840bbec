// A tensor as kernels take it: address, sizes, strides and dtype, in host and device code.
//
// The struct that an op's entry point takes lists its tensors as Arrays. What a call does with a tensor shows in its
// type: Array<const T> is read, Array<T> is written as a whole, InOutArray<T> is read and written or written in part.
// T is void where the dtype is known at run time alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"

#if defined(__CUDACC__)
#define TOPGATHER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TOPGATHER_HOST_DEVICE [[gnu::always_inline]] inline
#endif

namespace topgather {

template <typename T, int kNumDims>
struct Array {
  using Element = T;
  static constexpr int kRank = kNumDims;
  template <typename U>
  using PointerTo = std::conditional_t<std::is_const_v<T>, const U*, U*>;

  T* data;                    // null: no tensor was given, or one without elements
  int64_t sizes[kNumDims];    // a tensor with one dimension less has a first size of 1
  int64_t strides[kNumDims];  // in elements; 0 where the size is at most 1. The last is 1, or the size at most 1
  Dtype dtype;

  // Elements from the first one to the one at these indices; the dimensions left out count as index 0.
  template <typename... Indices>
  TOPGATHER_HOST_DEVICE constexpr int64_t offset(Indices... indices) const {
    static_assert(sizeof...(indices) <= kNumDims, "one index a dimension");
    int64_t sum = 0;
    [[maybe_unused]] int dim = 0;  // without indices
    ((sum += static_cast<int64_t>(indices) * strides[dim++]), ...);
    return sum;
  }

  // Address of the element at these indices, of a tensor that holds U.
  template <typename U, typename... Indices>
  TOPGATHER_HOST_DEVICE PointerTo<U> at(Indices... indices) const {
    static_assert(std::is_void_v<T> || std::is_same_v<std::remove_const_t<T>, U>, "the tensor's own element type");
    return static_cast<PointerTo<U>>(data) + offset(indices...);
  }

  constexpr int64_t num_elements() const {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return data == nullptr ? 0 : count;
  }

  // Elements from the first one to the end of the last one.
  constexpr int64_t extent() const {
    if (num_elements() == 0) return 0;
    int64_t last = 0;
    for (int dim = 0; dim < kNumDims; ++dim) last += (sizes[dim] - 1) * strides[dim];
    return last + 1;
  }

  // Whether every row, a run of the last dimension, starts on a boundary of so many bytes.
  bool has_aligned_rows(int64_t bytes) const {
    bool is_aligned = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
    for (int dim = 0; dim + 1 < kNumDims; ++dim) {
      is_aligned = is_aligned && strides[dim] * element_bytes(dtype) % bytes == 0;
    }
    return is_aligned;
  }

  void swap_dims(int a, int b) {
    const int64_t size = sizes[a], stride = strides[a];
    sizes[a] = sizes[b];
    strides[a] = strides[b];
    sizes[b] = size;
    strides[b] = stride;
  }
};

template <typename T, int kNumDims>
struct InOutArray : Array<T, kNumDims> {};

}  // namespace topgather
