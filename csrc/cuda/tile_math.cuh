// Products of tiles in shared memory, one warp at a time.
//
// Results c[m][n][4] are spread over the warp as the tensor cores spread a 16 x 8 block: lane 4 g + t holds of block
// (m, n) the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). For the 16-bit types mma.sync computes them;
// for float32 plain multiply-adds do, in the same places, so that float32 keeps float32's accuracy and its way with inf
// and NaN. Depths and widths known only at run time are warp-uniform: whole steps of 16 past them are left out, so what
// lies between them and the next multiple of 16 must hold zeros.
#pragma once

#include <type_traits>

#include "../common/dtype.h"
#include "shared_tile.cuh"
#include "warp.cuh"

namespace topgather::cuda {

// Columns of a 16 x 8 block that one lane holds, and rows.
constexpr int kBlockRows = 16;
constexpr int kBlockColumns = 8;
// Steps of 16 in depth that are laid out in a row: enough to overlap loads with products, few enough to spare
// registers.
constexpr int kDepthUnroll = 4;
constexpr int kManyBlocks = 8;  // of results: they leave registers for half as many steps

// c += A B^T.  A: rows first_a.. of `a` [.., depth]; B: rows first_b.. of `b` [.., depth], num_b of which count.
// kParts > 1: B is a sum of as many matrices, part_rows rows apart in `b`; 16-bit types only.
template <int kParts = 1, typename TileA, typename TileB, int kM, int kN>
__device__ __forceinline__ void multiply_by_rows(float (&c)[kM][kN][4], TileA& a, int first_a, TileB& b, int first_b,
                                                 int num_b, int depth, int part_rows = 0) {
  using Element = std::remove_reference_t<decltype(a.elements[0])>;
  const int lane = lane_id();
  if constexpr (std::is_same_v<Element, float>) {
    static_assert(kParts == 1, "float32 needs no parts");
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      float4 left[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        left[m][0] = *reinterpret_cast<const float4*>(a.chunk(first_a + m * 16 + g, k / 4));
        left[m][1] = *reinterpret_cast<const float4*>(a.chunk(first_a + m * 16 + g + 8, k / 4));
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (n * 8 >= num_b) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 right = *reinterpret_cast<const float4*>(b.chunk(first_b + n * 8 + 2 * t + e, k / 4));
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float& sum = c[m][n][2 * h + e];
              sum = fmaf(left[m][h].x, right.x, sum);
              sum = fmaf(left[m][h].y, right.y, sum);
              sum = fmaf(left[m][h].z, right.z, sum);
              sum = fmaf(left[m][h].w, right.w, sum);
            }
          }
        }
      }
    }
  } else {
    const SharedRow first_left = shared_row(a.chunk(first_a + (lane & 15), lane >> 4));
    const auto first_right = shared_row(b.chunk(first_b + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
#pragma unroll(kM* kN > kManyBlocks ? 2 : kDepthUnroll)
    for (int k = 0; k < TileA::kColumns / 16; ++k) {
      if (k * 16 >= depth) break;
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        load_matrix_x4(left[m], TileA::further(first_left, k * 2, m * 16));
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int n = 0; n < kN / 2; ++n) {
          if (n * 16 >= num_b) continue;
          uint32_t right[4];
          load_matrix_x4(right, TileB::further(first_right, k * 2, part * part_rows + n * 16));
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            multiply_accumulate<Element>(c[m][2 * n], left[m], right[0], right[1]);
            multiply_accumulate<Element>(c[m][2 * n + 1], left[m], right[2], right[3]);
          }
        }
      }
    }
    static_assert(kN % 2 == 0 || std::is_same_v<Element, float>, "matrix loads fetch two blocks of columns");
  }
}

// c += A B or A^T B, B: `b` [depth, ..], columns first_column.. of which num_columns count.
// A: rows first_a.. of `a` [.., depth], or, kIsTransposed, columns first_a.. of `a` [depth, ..].
template <bool kIsTransposed, typename TileA, typename TileB, int kM, int kN>
__device__ __forceinline__ void multiply_by_columns(float (&c)[kM][kN][4], TileA& a, int first_a, TileB& b,
                                                    int first_column, int num_columns, int depth) {
  using Element = std::remove_reference_t<decltype(a.elements[0])>;
  const int lane = lane_id();
  if constexpr (std::is_same_v<Element, float>) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < depth; ++k) {
      float left[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = first_a + m * 16 + h * 8 + g;
          left[m][h] = kIsTransposed ? a.at(k, row) : a.at(row, k);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (n * 8 >= num_columns) continue;
        const float2 right = *reinterpret_cast<const float2*>(&b.at(k, first_column + n * 8 + 2 * t));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            c[m][n][2 * h] = fmaf(left[m][h], right.x, c[m][n][2 * h]);
            c[m][n][2 * h + 1] = fmaf(left[m][h], right.y, c[m][n][2 * h + 1]);
          }
        }
      }
    }
  } else {
    constexpr int kSteps = (kIsTransposed ? TileA::kRows : TileA::kColumns) / 16;
#pragma unroll kDepthUnroll
    for (int k = 0; k < kSteps; ++k) {
      if (k * 16 >= depth) break;
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if constexpr (kIsTransposed) {
          load_matrix_x4_transposed(
              left[m], a.chunk(k * 16 + ((lane >> 4) << 3) + (lane & 7), (first_a + m * 16) / 8 + ((lane >> 3) & 1)));
        } else {
          load_matrix_x4(left[m], a.chunk(first_a + m * 16 + (lane & 15), k * 2 + (lane >> 4)));
        }
      }
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {
        if (n * 16 >= num_columns) continue;
        uint32_t right[4];
        load_matrix_x4_transposed(right, b.chunk(k * 16 + (lane & 15), first_column / 8 + n * 2 + (lane >> 4)));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply_accumulate<Element>(c[m][2 * n], left[m], right[0], right[1]);
          multiply_accumulate<Element>(c[m][2 * n + 1], left[m], right[2], right[3]);
        }
      }
    }
    static_assert(kN % 2 == 0 || std::is_same_v<Element, float>, "matrix loads fetch two blocks of columns");
  }
}

// Two neighbours of a row of results, rounded to the element type.
template <typename Element>
using Pair = std::conditional_t<std::is_same_v<Element, float>, float2, uint32_t>;
template <typename Element>
__device__ __forceinline__ Pair<Element> pack_pair(float low, float high) {
  if constexpr (std::is_same_v<Element, float>) {
    return make_float2(low, high);
  } else {
    return pack2<Element>(low, high);
  }
}
template <typename Element>
__device__ __forceinline__ float2 unpack_pair(Pair<Element> pair) {
  if constexpr (std::is_same_v<Element, float>) {
    return pair;
  } else {
    return unpack2<Element>(pair);
  }
}
// Results as pairs: of block (m, n) the lane's row g, then row g + 8.
template <typename Element, int kM, int kN>
__device__ __forceinline__ void pack_pairs(const float (&c)[kM][kN][4], Pair<Element> (&pairs)[kM][kN][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) pairs[m][n][h] = pack_pair<Element>(c[m][n][2 * h], c[m][n][2 * h + 1]);
    }
  }
}

// c += W B with W where a product left it, in registers, as pairs of the 16-bit Element: the layout of results is the
// layout of left operands. B: rows first_row.. of `b`, num_columns of whose columns count; depth of W's columns count.
template <typename Element, typename TileB, int kM, int kDepthBlocks, int kN>
__device__ __forceinline__ void multiply_pairs(float (&c)[kM][kN][4], const uint32_t (&w)[kM][kDepthBlocks][2],
                                               TileB& b, int first_row, int num_columns, int depth) {
  static_assert(kDepthBlocks % 2 == 0 && kN % 2 == 0, "steps of 16");
  const int lane = lane_id();
  const SharedRow first_right = shared_row(b.chunk(first_row + (lane & 15), lane >> 4));
#pragma unroll
  for (int k = 0; k < kDepthBlocks / 2; ++k) {
    if (k * 16 >= depth) break;
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) left[m][i] = w[m][2 * k + i / 2][i % 2];
    }
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      if (n * 16 >= num_columns) continue;
      uint32_t right[4];
      load_matrix_x4_transposed(right, TileB::further(first_right, n * 2, k * 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_accumulate<Element>(c[m][2 * n], left[m], right[0], right[1]);
        multiply_accumulate<Element>(c[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same with W in float32.
template <typename Element, typename TileB, int kM, int kDepthBlocks, int kN>
__device__ __forceinline__ void multiply_registers(float (&c)[kM][kN][4], const float (&w)[kM][kDepthBlocks][4],
                                                   TileB& b, int first_row, int num_columns, int depth) {
  uint32_t pairs[kM][kDepthBlocks][2];
  pack_pairs<Element>(w, pairs);
  multiply_pairs<Element>(c, pairs, b, first_row, num_columns, depth);
}

// The elements of 16 bytes, and back, rounded.
template <typename Element>
__device__ __forceinline__ void unpack_chunk(const uint4& words, float (&values)[16 / sizeof(Element)]) {
  const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      values[i] = __uint_as_float(all[i]);
    } else {
      const float2 pair = unpack2<Element>(all[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}
template <typename Element>
__device__ __forceinline__ uint4 pack_chunk(const float (&values)[16 / sizeof(Element)]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i] = pack2<Element>(values[2 * i], values[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Whether an element of 16 bytes is NaN or inf: one whose exponent has all bits set.
template <typename Element>
__device__ __forceinline__ bool is_unusual_chunk(const uint4& words) {
  constexpr uint32_t kLowest = std::is_same_v<Element, float>      ? 0x00800000u  // the exponent's lowest bits
                               : std::is_same_v<Element, BFloat16> ? 0x00800080u
                                                                   : 0x04000400u;
  constexpr uint32_t kSigns = sizeof(Element) == 4 ? 0x80000000u : 0x80008000u;
  constexpr uint32_t kExponents = kSigns - kLowest;
  const auto carries = [](uint32_t word) { return (word & kExponents) + kLowest; };  // into the sign
  return ((carries(words.x) | carries(words.y) | carries(words.z) | carries(words.w)) & kSigns) != 0;
}

// Stores four neighbours of a row of global memory, rounded, on the boundary of four elements.
template <typename Element>
__device__ __forceinline__ void store_four(Element* address, const float4& four) {
  if constexpr (std::is_same_v<Element, float>) {
    *reinterpret_cast<float4*>(address) = four;
  } else {
    *reinterpret_cast<uint2*>(address) = make_uint2(pack2<Element>(four.x, four.y), pack2<Element>(four.z, four.w));
  }
}

// Stores two neighbours of a row of a tile, rounded to its element type.
template <typename Tile>
__device__ __forceinline__ void store_pair(Tile& tile, int row, int column, float first, float second) {
  using Element = std::remove_reference_t<decltype(tile.elements[0])>;
  if constexpr (std::is_same_v<Element, float>) {
    *reinterpret_cast<float2*>(&tile.at(row, column)) = make_float2(first, second);
  } else {
    *reinterpret_cast<uint32_t*>(&tile.at(row, column)) = pack2<Element>(first, second);
  }
}

// Results of a row lie in pairs over four lanes. Of two neighbouring 16 x 8 blocks, an even lane trades its pair of the
// second for its neighbour's pair of the first: afterwards even lanes hold four columns in a row of the first block,
// odd lanes of the second, and the four lanes' stores together fill whole sectors. All lanes of the warp take part.
template <typename Pair>
struct FourColumns {
  Pair low;
  Pair high;
};
template <typename Pair>
__device__ __forceinline__ FourColumns<Pair> trade_pairs(const Pair& first, const Pair& second, int lane = lane_id()) {
  const bool is_odd = lane % 2 != 0;
  if constexpr (sizeof(Pair) == 4) {
    const Pair other = __shfl_xor_sync(kAllLanes, is_odd ? first : second, 1);
    return {is_odd ? other : first, is_odd ? second : other};
  } else {
    const float x = __shfl_xor_sync(kAllLanes, is_odd ? first.x : second.x, 1);
    const float y = __shfl_xor_sync(kAllLanes, is_odd ? first.y : second.y, 1);
    const Pair other = make_float2(x, y);
    return {is_odd ? other : first, is_odd ? second : other};
  }
}
// The first of a lane's four columns, counted from the first block's.
__device__ __forceinline__ int four_columns_start(int lane = lane_id()) {
  const int t = lane % 4;
  return t % 2 * 8 + t / 2 * 4;
}

// Two neighbours of a row in global memory, the first at an even column of a row that starts on their boundary.
template <typename Element>
__device__ __forceinline__ float2 load_pair(const Element* address) {
  if constexpr (std::is_same_v<Element, float>) {
    return *reinterpret_cast<const float2*>(address);
  } else {
    return unpack2<Element>(*reinterpret_cast<const uint32_t*>(address));
  }
}

// Stores columns `column` and `column + 1`, as far as the row reaches; the row may start on any element.
template <typename Element>
__device__ __forceinline__ void store_row_pair(Element* row, int column, int num_columns, float first, float second) {
  if (column + 1 < num_columns && reinterpret_cast<uintptr_t>(row) % (2 * sizeof(Element)) == 0) {
    if constexpr (std::is_same_v<Element, float>) {
      *reinterpret_cast<float2*>(row + column) = make_float2(first, second);
    } else {
      *reinterpret_cast<uint32_t*>(row + column) = pack2<Element>(first, second);
    }
  } else {
    if (column < num_columns) row[column] = from_float<Element>(first);
    if (column + 1 < num_columns) row[column + 1] = from_float<Element>(second);
  }
}

template <int kM, int kN>
__device__ __forceinline__ void fill(float (&c)[kM][kN][4], float value) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = value;
    }
  }
}

// Sum over the four lanes that share a row of a result.
__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
__device__ __forceinline__ float max_of_row(float value) {
  value = max_or_nan(value, __shfl_xor_sync(kAllLanes, value, 1));
  return max_or_nan(value, __shfl_xor_sync(kAllLanes, value, 2));
}

}  // namespace topgather::cuda
