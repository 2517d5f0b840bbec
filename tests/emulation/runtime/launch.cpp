// A launch: blocks one after another, each with fresh threads and poisoned shared memory.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "launch_lock.h"
#include "recording.h"
#include "shadow.h"

namespace topgather::emulation {

bool is_recording = false;
std::vector<RecordedLaunch> recorded_launches;

namespace {

Snapshot take_snapshot() {
  Snapshot snapshot;
  for (const DeclaredRange& range : ranges) {
    snapshot.emplace_back(range.begin,
                          std::string(reinterpret_cast<const char*>(range.begin), range.end - range.begin));
  }
  return snapshot;
}

std::string symbol_of(const void* kernel) {
  Dl_info module{};
  if (dladdr(kernel, &module) == 0 || module.dli_sname == nullptr || module.dli_saddr != kernel) {
    throw Error("a kernel has no visible symbol; it must not stand in an anonymous namespace");
  }
  return module.dli_sname;
}

void check_shape(const Launch& launch, const dim3& grid, const dim3& block) {
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  if (num_threads == 0 || num_threads > kMaxThreads || block.z > 64) throw Error("invalid launch: bad block shape");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    throw Error("invalid launch: bad grid shape");
  }
  if (launch.shared_bytes > options.shared_limit || launch.shared_bytes > kMaxSharedBytes) {
    throw Error("invalid launch: " + std::to_string(launch.shared_bytes) + " bytes of shared memory, the limit is " +
                std::to_string(options.shared_limit));
  }
  if (launch.num_argument_bytes > kMaxArgumentBytes) throw Error("invalid launch: more than 4 KB of arguments");
}

void prepare_block(const dim3& block) {
  if (options.poison) std::memset(state.shared, 0xff, state.shared_bytes);
  start_moments_of_block();
  state.num_alive = state.num_threads;
  state.num_at_barrier = 0;
  state.warps_at_barrier = 0;
  state.barrier_predicate = false;
  state.runnable_warps = 0;
  for (unsigned w = 0; w < state.num_warps; ++w) {
    Warp& warp = state.warps[w];
    const unsigned num_lanes = state.num_threads - w * kLanes < kLanes ? state.num_threads - w * kLanes : kLanes;
    warp.index = static_cast<uint16_t>(w);
    warp.alive = warp.runnable = warp.full = num_lanes == kLanes ? kAllLanes : (1u << num_lanes) - 1;
    warp.moment = moments.now;
    state.runnable_warps |= 1u << w;
    warp.open_meetings = 0;
    for (unsigned lane = 0; lane < num_lanes; ++lane) {
      const unsigned thread = w * kLanes + lane;
      Fiber& fiber = state.fibers[thread];
      fiber.thread = static_cast<uint16_t>(thread);
      fiber.lane = static_cast<uint16_t>(lane);
      fiber.warp = &warp;
      fiber.waiting_in = "nothing";
      fiber.waiting_at = nullptr;
      fiber.thread_idx = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
      prepare_fiber(&fiber);
    }
  }
}

std::vector<uint64_t> order_of_blocks(uint64_t num_blocks) {
  std::vector<uint64_t> order(num_blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (options.order == Order::kDescending) std::reverse(order.begin(), order.end());
  if (options.order == Order::kRandom) {
    for (uint64_t left = num_blocks; left > 1; --left) std::swap(order[left - 1], order[next_random() % left]);
  }
  return order;
}

void run_blocks(const Launch& launch, const dim3& grid, const dim3& block) {
  create_arena();
  state.random = options.seed * 0x9e3779b97f4a7c15ull | 1;
  state.num_threads = block.x * block.y * block.z;
  state.num_warps = (state.num_threads + kLanes - 1) / kLanes;
  state.launch = &launch;
  state.arguments = argument_copy();
  std::memcpy(argument_copy(), launch.arguments, launch.num_argument_bytes);
  resize_shared_memory(launch.shared_bytes);
  current_grid_dim = grid;
  current_block_dim = block;
  state.error.clear();
  start_moments_of_launch();
  ++statistics.launches;
  const CrashGuard guard;
  for (const uint64_t index : order_of_blocks(uint64_t{grid.x} * grid.y * grid.z)) {
    current_block_idx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                         static_cast<unsigned>(index / grid.x / grid.y)};
    prepare_block(block);
    ++statistics.blocks;
    statistics.threads += state.num_threads;
    start_block();
    if (!state.error.empty()) throw Error(state.error);
  }
}

}  // namespace

void run(const Launch& launch, const dim3& grid, const dim3& block) {
  const LaunchLock lock;
  try {
    check_shape(launch, grid, block);
    seal_memory();
    if (!is_recording) {
      run_blocks(launch, grid, block);
      return;
    }
    RecordedLaunch record{symbol_of(launch.kernel), grid, block, launch.shared_bytes, {}, take_snapshot(), {}};
    record.arguments.assign(static_cast<const char*>(launch.arguments), launch.num_argument_bytes);
    run_blocks(launch, grid, block);
    record.after = take_snapshot();
    recorded_launches.push_back(std::move(record));
  } catch (...) {
    drop_memory();
    throw;
  }
}

}  // namespace topgather::emulation
