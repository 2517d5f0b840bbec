// The filter of csrc/moba/moba_route_filter_cpu.h by itself, beside a definition of what it must choose. Compiled by
// test_routing_by_bytes.py for AVX-512, with csrc/ to be found.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "moba/moba_route_filter_cpu.h"

namespace topgather {
bool multiplies_bytes() { return __builtin_cpu_supports("avx512vnni"); }
}  // namespace topgather

using namespace topgather::TOPGATHER_CPU_TARGET;

// Of `count` queries [count, depth] and num_rows centroids [num_rows, depth], the list_length best of each query's first
// end[i]: chosen [count, list_length]. 1 where the filter chose, 0 where it refused.
extern "C" int choose(const float* centroids, int64_t num_rows, const float* queries, int64_t count, int64_t depth,
                      int64_t list_length, const int64_t* end, int32_t* chosen) {
  ByteCentroids bytes;
  RouteFilter filter;
  const auto cut = [&](ScratchCutter& cutter) {
    bytes.take(num_rows, depth, cutter);
    filter.take(num_rows, list_length, depth, cutter);
  };
  ScratchCutter measure(nullptr);
  cut(measure);
  auto* memory = static_cast<unsigned char*>(std::aligned_alloc(64, static_cast<size_t>(measure.used())));
  ScratchCutter cutter(memory);
  cut(cutter);
  bytes.fill(centroids, num_rows, depth);
  constexpr int64_t kTile = RouteFilter::kTileQueries;
  std::vector<float> tile(static_cast<size_t>(depth * kTile));
  for (int64_t i = 0; i < kTile; ++i) {
    for (int64_t d = 0; d < depth; ++d)
      tile[static_cast<size_t>(d * kTile + i)] = queries[std::min(i, count - 1) * depth + d];
  }
  const bool chose =
      RouteFilter::serves(num_rows, list_length, depth) && filter.select(bytes, centroids, tile.data(), count, end);
  for (int64_t i = 0; chose && i < count; ++i) std::copy_n(filter.chosen(i), list_length, chosen + i * list_length);
  std::free(memory);
  return chose;
}

// The same by the definition: scores summed by fused multiply-adds in ascending order of columns, of equal scores the
// lower row.
extern "C" void define(const float* centroids, int64_t, const float* queries, int64_t count, int64_t depth,
                       int64_t list_length, const int64_t* end, int32_t* chosen) {
  for (int64_t i = 0; i < count; ++i) {
    std::vector<float> scores(static_cast<size_t>(end[i]));
    for (size_t j = 0; j < scores.size(); ++j) {
      for (int64_t d = 0; d < depth; ++d) {
        scores[j] = std::fmaf(centroids[static_cast<int64_t>(j) * depth + d], queries[i * depth + d], scores[j]);
      }
    }
    std::vector<int32_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
    });
    std::sort(order.begin(), order.begin() + list_length);
    std::copy_n(order.begin(), list_length, chosen + i * list_length);
  }
}
