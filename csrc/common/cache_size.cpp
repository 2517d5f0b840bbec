#include "cache_size.h"

#include <atomic>
#include <fstream>

namespace topgather {
namespace {

std::atomic<int64_t> assumed_bytes{0};

int64_t read_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // as "32768K"
  int64_t kibibytes = 0;
  char unit = 0;
  if (file >> kibibytes >> unit && unit == 'K' && kibibytes > 0) return kibibytes << 10;
  return kUnknownCacheBytes;
}

}  // namespace

int64_t last_level_cache_bytes() {
  static const int64_t of_machine = read_cache_bytes();
  const int64_t assumed = assumed_bytes.load(std::memory_order_relaxed);
  return assumed > 0 ? assumed : of_machine;
}

void assume_last_level_cache(int64_t num_bytes) { assumed_bytes.store(num_bytes, std::memory_order_relaxed); }

}  // namespace topgather
