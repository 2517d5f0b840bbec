// Numbers out of the tuples that Python hands over.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace topgather {

inline int64_t integer_from(pybind11::handle item) {
  const long long value = PyLong_AsLongLong(item.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return value;
}

template <typename Pointer>
Pointer address_from(pybind11::handle item) {
  return reinterpret_cast<Pointer>(integer_from(item));
}

}  // namespace topgather
