// Blocks that are in every choice, whatever their scores, counted within top_k. Parameter structs of routers derive from it.
#pragma once

#include "fields.h"

namespace topgather {

struct RouteOptions {
  int64_t force_first;  // blocks of the sequence, from its first on
  int64_t force_last;   // the newest blocks up to the query's own, at least 1; only where causal
};
TOPGATHER_FIELDS(RouteOptions, force_first, force_last)

}  // namespace topgather
