// A worker's scratch memory, cut into pieces.
#pragma once

#include "simd.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Hands out pieces of a worker's scratch; with no memory behind it, it only counts.
class ScratchCutter {
 public:
  explicit ScratchCutter(unsigned char* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    unsigned char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

}  // namespace topgather::TOPGATHER_CPU_TARGET
