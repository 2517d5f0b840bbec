#include "cache_size.h"

#include <atomic>
#include <charconv>
#include <cstdio>
#include <cstring>

namespace topgather {
namespace {

std::atomic<int64_t> assumed_bytes{0};

// C's streams: those of C++ need glibc 2.33 (old_glibc.cpp).
int64_t read_cache_bytes() {
  char text[32] = {};  // as "32768K"
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fgets(text, sizeof(text), file) == nullptr) text[0] = 0;
    std::fclose(file);
  }
  int64_t kibibytes = 0;
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), kibibytes);
  return error == std::errc() && *end == 'K' && kibibytes > 0 ? kibibytes << 10 : kUnknownCacheBytes;
}

}  // namespace

int64_t last_level_cache_bytes() {
  static const int64_t of_machine = read_cache_bytes();
  const int64_t assumed = assumed_bytes.load(std::memory_order_relaxed);
  return assumed > 0 ? assumed : of_machine;
}

void assume_last_level_cache(int64_t num_bytes) { assumed_bytes.store(num_bytes, std::memory_order_relaxed); }

}  // namespace topgather
