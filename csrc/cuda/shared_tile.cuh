// A matrix in shared memory, laid out so that neither rows nor columns of 8 x 8 sub-matrices meet in one bank.
//
// Rows are cut into chunks of 16 bytes, the unit of asynchronous copies and of matrix loads. Chunk c of row r stands
// where chunk c ^ (r mod 8) would without the exchange, so eight rows of one chunk column lie in eight different groups
// of banks. Narrow tiles, with fewer than eight chunks a row, exchange as far as they reach.
#pragma once

#include "primitives.cuh"

namespace topgather::cuda {

template <typename Element, int kNumRows, int kNumColumns>
struct alignas(128) SharedTile {
  static constexpr int kRows = kNumRows;
  static constexpr int kColumns = kNumColumns;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kChunks = kColumns / kPerChunk;
  static_assert(kColumns % kPerChunk == 0 && (kChunks & (kChunks - 1)) == 0, "a row is a power of two of chunks");
  static constexpr int kExchanged = kChunks < 8 ? kChunks : 8;
  // With fewer chunks, several rows share 128 bytes of banks and exchange alike.
  static constexpr int kRowShift = kChunks >= 8 ? 0 : (kChunks == 4 ? 1 : (kChunks == 2 ? 2 : 3));

  Element elements[kRows * kColumns];

  __device__ __forceinline__ Element* chunk(int row, int chunk_idx) {
    return elements + row * kColumns + (chunk_idx ^ ((row >> kRowShift) & (kExchanged - 1))) * kPerChunk;
  }
  // `start` is a row's first or second chunk: the one num_chunks further, an even number, num_rows below, a multiple of
  // 16. One exchange of bits, where chunk() takes the row's anew: eight of them would be kept in registers.
  static __device__ __forceinline__ SharedRow further(SharedRow start, int num_chunks, int num_rows) {
    constexpr int kRowBytes = kChunks * 16;
    const int near = num_chunks & (kExchanged - 1);
    return moved(start, static_cast<uint32_t>(near * 16),
                 static_cast<uint32_t>((num_chunks - near) * 16 + num_rows * kRowBytes));
  }
  // The same, made anew wherever it stands instead of kept from one pass of a loop to the next, and bytes_on.
  static __device__ __forceinline__ SharedRow further_here(SharedRow start, int num_chunks, int num_rows,
                                                           uint32_t bytes_on) {
    constexpr int kRowBytes = kChunks * 16;
    const int near = num_chunks & (kExchanged - 1);
    return moved_here(start, static_cast<uint32_t>(near * 16),
                      static_cast<uint32_t>((num_chunks - near) * 16 + num_rows * kRowBytes) + bytes_on);
  }
  __device__ __forceinline__ Element& at(int row, int column) {
    return chunk(row, column / kPerChunk)[column % kPerChunk];
  }
};

// Rows of a matrix in global memory that a tile is filled from: rows of `row_chunks` chunks of 16 bytes each.
// Starts the copy of chunk `chunk_idx` of row `row`; what is not there becomes zeros.
template <typename Tile, typename Element>
__device__ __forceinline__ void copy_chunk_async(Tile& tile, int row, int chunk_idx, const Element* global_row,
                                                 int row_chunks, bool is_row_there) {
  const bool is_copied = is_row_there && chunk_idx < row_chunks;
  copy_async_16(tile.chunk(row, chunk_idx), is_copied ? global_row + chunk_idx * Tile::kPerChunk : global_row,
                is_copied);
}

}  // namespace topgather::cuda
