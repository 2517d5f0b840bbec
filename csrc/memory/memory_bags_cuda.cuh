// What groups of lanes work on in lookups and dot products, and the bags of tokens. The arguments of a kernel have the
// fields that are named here, as MemoryLookupArguments has them.
#pragma once

#include "../cuda/lane_rows.cuh"

namespace topgather {

// What a group of lanes works on.
struct Task {
  int64_t token;
  int part;
  int lane_in_row;
  bool is_there;
};

template <typename Arguments>
__device__ __forceinline__ Task task_of(const Arguments& args, uint32_t warp) {
  const int lanes_per_row = args.shape.lanes_per_row;
  const uint32_t tokens = warp / args.parts_per_token;
  Task task;
  task.part = static_cast<int>(warp - tokens * args.parts_per_token);
  task.token = static_cast<int64_t>(tokens) * (kLanes / lanes_per_row) + lane_id() / lanes_per_row;
  task.lane_in_row = lane_id() % lanes_per_row;
  task.is_there = task.token < args.num_tokens;
  return task;
}

constexpr int32_t kNoRow = -1;

// The entries of a lookup's token.
struct Bag {
  int64_t first;
  int32_t size;
  int32_t longest;  // size of the longest one of the warp
  bool is_valid;
};

template <bool kRagged, typename Arguments>
__device__ __forceinline__ Bag bag_of(const Arguments& args, const Task& task) {
  if constexpr (!kRagged) return {task.token * args.bag_size, args.bag_size, args.bag_size, true};
  Bag bag = {0, 0, 0, true};
  if (task.is_there) {
    const int64_t first = args.offsets[task.token], end = args.offsets[task.token + 1];
    bag.is_valid = first >= 0 && first <= end && end <= args.num_entries;
    if (bag.is_valid) {
      bag.first = first;
      bag.size = static_cast<int32_t>(end - first);
    }
  }
  bag.longest = bag.size;
  for (int distance = kMinLanesPerRow; distance < kLanes; distance *= 2) {
    bag.longest = max(bag.longest, __shfl_xor_sync(kAllLanes, bag.longest, distance));
  }
  return bag;
}

}  // namespace topgather
