// One launch at a time, whatever thread it comes from.
#pragma once

namespace topgather::emulation {

class LaunchLock {
 public:
  LaunchLock();
  ~LaunchLock();
  LaunchLock(const LaunchLock&) = delete;
  LaunchLock& operator=(const LaunchLock&) = delete;
};

}  // namespace topgather::emulation
