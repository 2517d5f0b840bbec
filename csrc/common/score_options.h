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

}  // namespace topgather
