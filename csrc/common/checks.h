// Preconditions the native side asserts again, after the Python layer's own checks.
#pragma once

#include <stdexcept>
#include <string>

namespace topgather {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace topgather
