// The best of a stream of numbered scores, a list for every vector lane.
#pragma once

#include "intrinsics.h"
#include "scratch.h"
#include "simd.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Lists of a tile of kVectors vectors. Numbers come in ascending order and an insertion needs a strictly greater score,
// so of equal scores the lower number stays. Lists are filled by position, never by score, while they are short, so no
// score whatever can lead out of bounds. Callers make +inf of NaN.
template <typename T, int kVectors>
struct TopLists {
  static constexpr int64_t kTileLanes = kVectors * kLanes<T>;

  int64_t length;
  T* scores;                  // [length, kTileLanes], descending
  IntegerVector<T>* numbers;  // [length, kVectors], -1 where nothing is kept

  void take(int64_t list_length, ScratchCutter& scratch) {
    length = list_length;
    scores = scratch.take<T>(length * kTileLanes);
    numbers = scratch.take<IntegerVector<T>>(length * kVectors);
  }

  void clear() {
    for (int64_t i = 0; i < length * kVectors; ++i) numbers[i] = IntegerVector<T>{} - 1;
  }

  // One number into the lists of one vector, of which num_kept entries are in use. `active` masks lanes that take part.
  // Every rank decides by itself, from the bottom up: an entry beaten strictly takes its upper neighbour where that is
  // beaten too, else the newcomer; so equals stay above.
  void insert(int vector_idx, int64_t num_kept, const Vector<T>& score, const IntegerVector<T>& number,
              const IntegerVector<T>& active) {
    T* values = scores + vector_idx * kLanes<T>;
    IntegerVector<T>* kept = numbers + vector_idx;
    int64_t rank = num_kept;
    IntegerVector<T> beaten = active;
    if (num_kept == length) {
      --rank;
      beaten = (score > load<T>(values + rank * kTileLanes)) & active;
    }
    for (; rank > 0; --rank) {
      const Vector<T> above = load<T>(values + (rank - 1) * kTileLanes);
      const IntegerVector<T> above_number = kept[(rank - 1) * kVectors];
      const IntegerVector<T> above_beaten = (score > above) & active;
      T* here = values + rank * kTileLanes;
      IntegerVector<T>& here_number = kept[rank * kVectors];
      store<T>(here, beaten ? (above_beaten ? above : score) : load<T>(here));
      here_number = beaten ? (above_beaten ? above_number : number) : here_number;
      beaten = above_beaten;
    }
    store<T>(values, beaten ? score : load<T>(values));
    kept[0] = beaten ? number : kept[0];
  }

  // The order-th number of the stream, counted from 0: one comparison with each lane's worst kept score, and only where
  // a lane beats it an insertion.
  void offer(int vector_idx, int64_t order, const Vector<T>& score, const IntegerVector<T>& number,
             const IntegerVector<T>& active) {
    if (order < length) {
      insert(vector_idx, order, score, number, active);
    } else {
      const Vector<T> worst = load<T>(scores + (length - 1) * kTileLanes + vector_idx * kLanes<T>);
      if (any_lane((score > worst) & active)) insert(vector_idx, length, score, number, active);
    }
  }

  // A lane's numbers in ascending order; returns how many.
  int64_t write_ascending(int64_t lane, int32_t* target) const {
    using Integer = typename VectorTraits<T>::IntegerElement;
    const Integer* column = reinterpret_cast<const Integer*>(numbers) + lane;
    int64_t count = 0;
    for (int64_t rank = 0; rank < length; ++rank) {
      const int32_t number = static_cast<int32_t>(column[rank * kTileLanes]);
      if (number < 0) continue;
      int64_t slot = count++;
      for (; slot > 0 && target[slot - 1] > number; --slot) target[slot] = target[slot - 1];
      target[slot] = number;
    }
    return count;
  }
};

}  // namespace topgather::TOPGATHER_CPU_TARGET
