// The workspace of an op that works in waves: how much of it a wave may take, and its pieces. Host code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rounding.h"

namespace topgather {

// What waves may take of the workspace, if not what the op's config says; 0: as it says. For tests of many small waves
// and for devices with little memory.
int64_t workspace_budget(int64_t configured);

// Replaces what workspace_budget gives every op; returns what it was set to before.
int64_t set_workspace_budget(int64_t bytes);

// Hands out 256-byte aligned pieces of the workspace; without memory behind it, it only counts.
class WorkspaceCutter {
 public:
  explicit WorkspaceCutter(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    unsigned char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += multiple_of(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

}  // namespace topgather
