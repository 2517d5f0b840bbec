// Rows of tables and caches as lanes of a warp hold them.
//
// A group of 8, 16 or 32 neighbouring lanes shares a row; narrow rows leave room for several groups in a warp. A lane
// holds 16 bytes of a row whose start, stride and width allow it, else two single elements a group's width apart,
// so that neighbouring lanes read neighbouring memory either way. What a group holds at a time is a slab of the row.
#pragma once

#include "../common/array.h"
#include "../common/checks.h"
#include "launch.cuh"
#include "tile_math.cuh"

namespace topgather {

constexpr int kMinLanesPerRow = 8;
constexpr int kPiecesWithoutVectors = 2;

template <typename Element>
constexpr int kElementsPerVector = 16 / static_cast<int>(sizeof(Element));

// How warps share out the slabs of rows.
struct RowShape {
  int32_t row_dim;
  int32_t lanes_per_row;  // 8, 16 or 32
  int32_t num_slabs;      // of a row, at least 1
};

template <int kVector>
RowShape row_shape(int64_t row_dim) {
  constexpr int64_t kPerLane = kVector == 1 ? kPiecesWithoutVectors : kVector;
  require(row_dim <= INT32_MAX - cuda::kLanes * kPerLane, "rows on CUDA must fit 31 bits");
  const int64_t lanes = (row_dim + kPerLane - 1) / kPerLane;
  int32_t lanes_per_row = kMinLanesPerRow;
  while (lanes_per_row < lanes && lanes_per_row < cuda::kLanes) lanes_per_row *= 2;
  const int64_t slabs = (lanes + lanes_per_row - 1) / lanes_per_row;
  return {static_cast<int32_t>(row_dim), lanes_per_row, static_cast<int32_t>(slabs > 0 ? slabs : 1)};
}

// Whether rows may be read 16 bytes at a time.
template <typename Element, typename T>
bool has_vector_rows(const Array<T, 2>& rows) {
  return rows.sizes[1] % kElementsPerVector<Element> == 0 && rows.has_aligned_rows(16);
}

// A lane's part of a row as it is stored; zeros until it is loaded.
template <typename Element, int kVector>
struct LanePart {
  static constexpr int kCount = kVector;
  uint4 words = {0u, 0u, 0u, 0u};
};

template <typename Element>
struct LanePart<Element, 1> {
  static constexpr int kCount = kPiecesWithoutVectors;
  Element elements[kPiecesWithoutVectors] = {};
};

// Which columns a lane holds of one slab.
template <typename Element, int kVector>
struct LaneColumns {
  using Part = LanePart<Element, kVector>;
  static constexpr int kCount = Part::kCount;

  int first;
  int step;  // between pieces
  int row_dim;

  __device__ __forceinline__ LaneColumns(const RowShape& shape, int slab, int lane_in_row)
      : first(slab * shape.lanes_per_row * kCount + lane_in_row * kVector),
        step(shape.lanes_per_row),
        row_dim(shape.row_dim) {}

  __device__ __forceinline__ void load(const Element* row, bool is_there, Part& part) const {
    if constexpr (kVector > 1) {
      if (is_there && first < row_dim) part.words = *reinterpret_cast<const uint4*>(row + first);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (is_there && first + i * step < row_dim) part.elements[i] = row[first + i * step];
      }
    }
  }

  // The same of a row that is there, with no branch around the load of a vector: a lane past the row's end gets some of
  // its elements. stride: between rows of the table.
  __device__ __forceinline__ void load_any(const Element* table, uint32_t row, int64_t stride, Part& part) const {
    if constexpr (kVector > 1) {
      const int column = first < row_dim ? first : 0;
      const auto* vectors = reinterpret_cast<const uint4*>(table + column);
      part.words = vectors[static_cast<uint64_t>(row) * static_cast<uint32_t>(stride / kVector)];
    } else {
      load(table + row * stride, true, part);
    }
  }

  __device__ __forceinline__ bool is_past_end() const { return kVector > 1 && first >= row_dim; }

  __device__ __forceinline__ void store(Element* row, const float (&sums)[kCount]) const {
    if constexpr (kVector == 1) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (first + i * step < row_dim) row[first + i * step] = cuda::from_float<Element>(sums[i]);
      }
    } else if (first < row_dim) {
      *reinterpret_cast<uint4*>(row + first) = cuda::pack_chunk<Element>(sums);
    }
  }

  // For rows of a workspace that start on 16-byte boundaries wherever rows of the table do.
  __device__ __forceinline__ void store_float32(float* row, const float (&sums)[kCount]) const {
    if constexpr (kVector == 1) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (first + i * step < row_dim) row[first + i * step] = sums[i];
      }
    } else if (first < row_dim) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        *reinterpret_cast<float4*>(row + first + i) = make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
      }
    }
  }
};

template <typename Element, int kVector>
__device__ __forceinline__ void unpack(const LanePart<Element, kVector>& part,
                                       float (&values)[LanePart<Element, kVector>::kCount]) {
  if constexpr (kVector == 1) {
#pragma unroll
    for (int i = 0; i < kPiecesWithoutVectors; ++i) values[i] = cuda::to_float(part.elements[i]);
  } else {
    cuda::unpack_chunk<Element>(part.words, values);
  }
}

// Four sums over the lanes of a row at once: lane l returns that of sums[l % 4]. Lanes are added in a fixed order.
__device__ __forceinline__ float sum_over_lanes(const float (&sums)[4], int lanes_per_row) {
  const int lane = cuda::lane_id();
  const bool is_odd = (lane & 1) != 0, is_upper = (lane & 2) != 0;
  const float low = (is_odd ? sums[1] : sums[0]) + __shfl_xor_sync(cuda::kAllLanes, is_odd ? sums[0] : sums[1], 1);
  const float high = (is_odd ? sums[3] : sums[2]) + __shfl_xor_sync(cuda::kAllLanes, is_odd ? sums[2] : sums[3], 1);
  float sum = (is_upper ? high : low) + __shfl_xor_sync(cuda::kAllLanes, is_upper ? low : high, 2);
  for (int distance = 4; distance < lanes_per_row; distance *= 2) {
    sum += __shfl_xor_sync(cuda::kAllLanes, sum, distance);
  }
  return sum;
}

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fffffffu); }

}  // namespace topgather
