// A worker's scratch memory, cut into pieces.
#pragma once

#include "../common/parallel.h"
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

// Scratch of every worker, as much as make(cutter) takes.
class WorkerScratch {
 public:
  template <typename Make>
  WorkerScratch(int num_workers, const Make& make) {
    ScratchCutter measure(nullptr);
    make(measure);
    worker_bytes_ = measure.used();
    buffer_ = allocate_aligned(static_cast<size_t>(worker_bytes_) * static_cast<size_t>(num_workers));
  }
  ScratchCutter of(int worker) const { return ScratchCutter(buffer_.get() + worker * worker_bytes_); }

 private:
  int64_t worker_bytes_;
  AlignedBuffer buffer_;
};

}  // namespace topgather::TOPGATHER_CPU_TARGET
