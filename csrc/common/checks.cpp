#include "checks.h"

#include <stdexcept>

namespace topgather {

void throw_invalid_argument(const char* message) { throw std::invalid_argument(message); }

}  // namespace topgather
