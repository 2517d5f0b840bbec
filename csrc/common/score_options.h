// What attention makes of a query's and a key's dot product before the softmax: options that every attention takes.
// Parameter structs derive from it, so that an option more is a field here.
#pragma once

#include "fields.h"

namespace topgather {

struct ScoreOptions {
  double scale;
  double softcap;  // scaled scores become softcap * tanh(score / softcap); 0: they stay
};
TOPGATHER_FIELDS(ScoreOptions, scale, softcap)

// Of attention to blocks: what a query sees besides those that it chose.
struct BlockScoreOptions : ScoreOptions {
  using Shared = ScoreOptions;
  int64_t window;  // causal: keys at positions p - window + 1 to p, seen from position p; 0: none
};
TOPGATHER_FIELDS(BlockScoreOptions, window)

}  // namespace topgather
