// How Python calls an entry point: one positional argument a field of its parameter struct, in the order of the list
// that TOPGATHER_FIELDS gives. Python reads that order, by name, when it imports the module
// (python/topgather/_common/spec.py), so no call depends on a position that somebody wrote down.
#pragma once

#include <Python.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "array.h"
#include "fields.h"

namespace topgather {

// What a tensor is, as torch tells it. Sizes and strides belong to the tensor.
struct TensorView {
  void* data;
  Dtype dtype;
  int num_dims;
  const int64_t* sizes;
  const int64_t* strides;
};

// Fills sizes, strides, data and dtype of an array of `rank` dimensions from a tensor, from None, or from the tuple
// (address, dtype code, sizes, strides). `expected` is the dtype code that a typed array needs, or -1.
void read_array(PyObject* object, const char* name, int rank, int expected, void** data, int64_t* sizes,
                int64_t* strides, Dtype* dtype);
int64_t read_integer(PyObject* object, const char* name);  // 0 for None
double read_number(PyObject* object, const char* name);    // 0 for None

// Thrown while Python has an error set, which is then what the call raises.
struct PythonError {};

// What a call of Python's interface returned, a new reference; throws PythonError where that is null.
PyObject* checked(PyObject* object);

// A reference of its own.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(checked(object)) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// New references.
PyObject* to_python(const std::string& text);
PyObject* to_python(const std::vector<std::string>& texts);               // a list
PyObject* to_python(const std::vector<int64_t>& numbers);                 // a list
void set_attribute(PyObject* object, const char* name, PyObject* value);  // takes the reference over
std::string read_text(PyObject* object, const char* name);

template <typename T>
inline constexpr int kRequiredDtype = -1;  // void: any
template <>
inline constexpr int kRequiredDtype<int32_t> = static_cast<int>(Dtype::kInt32);
template <>
inline constexpr int kRequiredDtype<double> = static_cast<int>(Dtype::kFloat64);
template <>
inline constexpr int kRequiredDtype<int64_t> = static_cast<int>(Dtype::kInt64);
template <>
inline constexpr int kRequiredDtype<int8_t> = static_cast<int>(Dtype::kInt8);
template <>
inline constexpr int kRequiredDtype<float> = static_cast<int>(Dtype::kFloat32);

template <typename Field>
concept IsArray = requires { Field::kRank; };

template <typename Field>
void read_field(PyObject* object, const char* name, Field& field) {
  if constexpr (IsArray<Field>) {
    void* data = nullptr;
    read_array(object, name, Field::kRank, kRequiredDtype<std::remove_const_t<typename Field::Element>>, &data,
               field.sizes, field.strides, &field.dtype);
    field.data = static_cast<typename Field::Element*>(data);
  } else if constexpr (std::is_floating_point_v<Field>) {
    field = static_cast<Field>(read_number(object, name));
  } else {
    field = static_cast<Field>(read_integer(object, name));
  }
}

template <typename Params>
std::vector<std::string> field_names() {
  std::vector<std::string> names;
  Params params{};
  visit_all_fields(params, [&](const char* name, auto&) { names.emplace_back(name); });
  return names;
}

// Tensors whose rows must start on 16-byte boundaries on CUDA, and are read there in whole multiples of 16 bytes, as
// asynchronous copies need: Params::kAlignedOnCuda, an array of names. What stands between a row's end and the multiple
// are zeros.
template <typename Params>
std::vector<std::string> aligned_names() {
  std::vector<std::string> names;
  if constexpr (requires { Params::kAlignedOnCuda; }) {
    for (const char* name : Params::kAlignedOnCuda) names.emplace_back(name);
  }
  return names;
}

template <typename Params>
Params read_params(PyObject* const* arguments) {
  Params params{};
  visit_all_fields(params, [&](const char* name, auto& field) { read_field(*arguments++, name, field); });
  complete(params);
  return params;
}

// A function as Python calls it: a new reference, or null for None. The arguments are there and counted.
using NativeCall = std::function<PyObject*(PyObject* const* arguments)>;
void add_function(PyObject* module, const std::string& name, size_t num_arguments, NativeCall call);
// A function whose arguments' names Python can ask for.
void add_entry(PyObject* module, const std::string& name, std::vector<std::string> argument_names, NativeCall call);
void set_aligned_arguments(PyObject* module, const std::string& name, const std::vector<std::string>& names);

// Lets other Python threads run.
class WithoutInterpreterLock {
 public:
  WithoutInterpreterLock() : state_(PyEval_SaveThread()) {}
  ~WithoutInterpreterLock() { PyEval_RestoreThread(state_); }
  WithoutInterpreterLock(const WithoutInterpreterLock&) = delete;
  WithoutInterpreterLock& operator=(const WithoutInterpreterLock&) = delete;

 private:
  PyThreadState* state_;
};

// Adds the CPU entry point `<name>_cpu`: the function `member` of the kernels in use. `check` throws for what tensors
// hold where a kernel would follow it.
template <typename Kernels, typename Params>
void add_cpu_entry(PyObject* module, const std::string& name, void (*Kernels::*member)(const Params&),
                   void (*check)(const Params&) = nullptr) {
  set_aligned_arguments(module, name, aligned_names<Params>());
  add_entry(module, name + "_cpu", field_names<Params>(), [member, check](PyObject* const* arguments) {
    const Params params = read_params<Params>(arguments);
    if (check != nullptr) check(params);
    const WithoutInterpreterLock unlocked;
    (kernels_in_use(static_cast<const Kernels*>(nullptr)).*member)(params);
    return nullptr;
  });
}

// Adds what Python needs besides entry points: their names and argument names, and how tensors are read. Once a module.
void add_native_calls(PyObject* module);

}  // namespace topgather
