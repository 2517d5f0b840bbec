// Launches as data, so that another interpreter can replay them and compare what they wrote.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "state.h"

namespace topgather::emulation {

using Snapshot = std::vector<std::pair<uintptr_t, std::string>>;  // address, bytes

struct RecordedLaunch {
  std::string name;  // the kernel's mangled symbol
  dim3 grid, block;
  size_t shared_bytes;
  std::string arguments;
  Snapshot before, after;  // of everything declared
};

extern bool is_recording;
extern std::vector<RecordedLaunch> recorded_launches;

}  // namespace topgather::emulation
