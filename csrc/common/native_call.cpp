#include "native_call.h"

#include <memory>
#include <new>
#include <stdexcept>

namespace topgather {

namespace {

// --- tensors --------------------------------------------------------------------------------------------------------

// The parts of DLPack's C interface (dlpack.h, version 1) that are used here. torch 2.10 and later offer it as
// torch.Tensor.__dlpack_c_exchange_api__: a tensor is read without a call of Python and without a reference taken.
struct DlpackDtype {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DlpackTensor {
  void* data;
  struct {
    int32_t type;
    int32_t id;
  } device;
  int32_t ndim;
  DlpackDtype dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlpackExchange {
  uint32_t major_version;
  uint32_t minor_version;
  DlpackExchange* previous;
  void* allocate;
  void* managed_tensor_from_object;
  void* object_from_managed_tensor;
  int (*tensor_from_object)(void* object, DlpackTensor* tensor);
  void* current_stream;
};

const DlpackExchange* exchange = nullptr;

// Takes the capsule that torch offers; False, and tensors must come as tuples, where it is of another version.
bool use_exchange(PyObject* capsule) {
  exchange = nullptr;
  if (capsule == Py_None) return false;
  auto* offered = static_cast<const DlpackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (offered == nullptr) throw PythonError();
  constexpr uint32_t kMajorVersion = 1;
  while (offered != nullptr && offered->major_version != kMajorVersion) offered = offered->previous;
  if (offered != nullptr && offered->tensor_from_object != nullptr) exchange = offered;
  return exchange != nullptr;
}

Dtype dtype_of(const DlpackDtype& dtype, const char* name) {
  constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4;
  if (dtype.lanes == 1) {
    if (dtype.code == kFloat && dtype.bits == 32) return Dtype::kFloat32;
    if (dtype.code == kFloat && dtype.bits == 64) return Dtype::kFloat64;
    if (dtype.code == kFloat && dtype.bits == 16) return Dtype::kFloat16;
    if (dtype.code == kBFloat && dtype.bits == 16) return Dtype::kBFloat16;
    if (dtype.code == kInt && dtype.bits == 32) return Dtype::kInt32;
    if (dtype.code == kInt && dtype.bits == 64) return Dtype::kInt64;
    if (dtype.code == kInt && dtype.bits == 8) return Dtype::kInt8;
  }
  throw std::invalid_argument(std::string(name) + " has a dtype that no kernel takes");
}

constexpr int kMaxDims = 8;

struct OwnedView : TensorView {
  int64_t numbers[2 * kMaxDims];
};

void view_of(PyObject* object, const char* name, OwnedView& view) {
  if (PyTuple_CheckExact(object)) {
    if (PyTuple_Size(object) != 4) throw std::invalid_argument(std::string(name) + " is no description of a tensor");
    PyObject* sizes = PyTuple_GetItem(object, 2);
    PyObject* strides = PyTuple_GetItem(object, 3);
    if (!PyTuple_Check(sizes) || !PyTuple_Check(strides) || PyTuple_Size(sizes) != PyTuple_Size(strides) ||
        PyTuple_Size(sizes) > kMaxDims) {
      throw std::invalid_argument(std::string(name) + " is no description of a tensor");
    }
    view.data = reinterpret_cast<void*>(read_integer(PyTuple_GetItem(object, 0), name));
    view.dtype = static_cast<Dtype>(read_integer(PyTuple_GetItem(object, 1), name));
    view.num_dims = static_cast<int>(PyTuple_Size(sizes));
    for (int dim = 0; dim < view.num_dims; ++dim) {
      view.numbers[dim] = read_integer(PyTuple_GetItem(sizes, dim), name);
      view.numbers[kMaxDims + dim] = read_integer(PyTuple_GetItem(strides, dim), name);
    }
    view.sizes = view.numbers;
    view.strides = view.numbers + kMaxDims;
    return;
  }
  if (exchange == nullptr) throw std::invalid_argument(std::string(name) + " must come as a tuple with this torch");
  DlpackTensor tensor{};
  if (exchange->tensor_from_object(object, &tensor) != 0) throw PythonError();
  view.data = static_cast<unsigned char*>(tensor.data) + tensor.byte_offset;
  view.dtype = dtype_of(tensor.dtype, name);
  view.num_dims = tensor.ndim;
  view.sizes = tensor.shape;
  view.strides = tensor.strides;
}

// --- entry points ---------------------------------------------------------------------------------------------------

struct Entry {
  std::string name;
  size_t num_arguments;
  NativeCall call;
  PyMethodDef definition;
};

std::vector<std::unique_ptr<Entry>>& entries() {
  static auto* all = new std::vector<std::unique_ptr<Entry>>;  // as long as the process: Python functions point into it
  return *all;
}

// Errors of C++ as Python's.
PyObject* call_entry(PyObject* self, PyObject* const* arguments, Py_ssize_t num_arguments) {
  const Entry& entry = *static_cast<const Entry*>(PyCapsule_GetPointer(self, nullptr));
  try {
    if (static_cast<size_t>(num_arguments) != entry.num_arguments) {
      throw std::invalid_argument(entry.name + " takes " + std::to_string(entry.num_arguments) + " arguments, got " +
                                  std::to_string(num_arguments));
    }
    PyObject* result = entry.call(arguments);
    if (result != nullptr) return result;
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    // set
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Raises a TypeError whose cause is the error that is set.
[[noreturn]] void throw_type_error(const std::string& message) {
  PyObject *type = nullptr, *cause = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &cause, &traceback);
  PyErr_NormalizeException(&type, &cause, &traceback);
  if (traceback != nullptr) PyException_SetTraceback(cause, traceback);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  PyErr_SetString(PyExc_TypeError, message.c_str());
  PyObject *new_type = nullptr, *error = nullptr, *new_traceback = nullptr;
  PyErr_Fetch(&new_type, &error, &new_traceback);
  PyErr_NormalizeException(&new_type, &error, &new_traceback);
  PyException_SetCause(error, cause);  // takes the reference over
  PyErr_Restore(new_type, error, new_traceback);
  throw PythonError();
}

}  // namespace

void read_array(PyObject* object, const char* name, int rank, int expected, void** data, int64_t* sizes,
                int64_t* strides, Dtype* dtype) {
  if (object == Py_None) return;  // all zeros
  OwnedView view;
  view_of(object, name, view);
  if (expected >= 0 && static_cast<int>(view.dtype) != expected) {
    throw std::invalid_argument(std::string(name) + " has another dtype than the kernel reads");
  }
  const int missing = rank - view.num_dims;
  if (missing != 0 && missing != 1) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(view.num_dims) +
                                " dimensions where a kernel takes " + std::to_string(rank));
  }
  *dtype = view.dtype;
  bool is_empty = false;
  for (int dim = 0; dim < rank; ++dim) {
    sizes[dim] = dim < missing ? 1 : view.sizes[dim - missing];
    strides[dim] = sizes[dim] <= 1 ? 0 : view.strides[dim - missing];
    is_empty = is_empty || sizes[dim] == 0;
  }
  if (strides[rank - 1] > 1) throw std::invalid_argument(std::string(name) + " must have a contiguous last dimension");
  if (!is_empty) *data = view.data;
}

int64_t read_integer(PyObject* object, const char* name) {
  if (object == Py_None) return 0;
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) {
    throw_type_error(std::string(name) + " must be an int that fits 64 bits");
  }
  return value;
}

double read_number(PyObject* object, const char* name) {
  if (object == Py_None) return 0;
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    throw_type_error(std::string(name) + " must be a number");
  }
  return value;
}

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return object;
}

PyObject* to_python(const std::string& text) {
  return checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

template <typename Value, typename Convert>
static PyObject* to_list(const std::vector<Value>& values, const Convert& convert) {
  Owned list(PyList_New(0));
  for (const Value& value : values) {
    const Owned item(checked(convert(value)));
    if (PyList_Append(list.get(), item.get()) != 0) throw PythonError();
  }
  return list.release();
}

PyObject* to_python(const std::vector<std::string>& texts) {
  return to_list(texts, [](const std::string& text) { return to_python(text); });
}

PyObject* to_python(const std::vector<int64_t>& numbers) {
  return to_list(numbers, [](int64_t number) { return PyLong_FromLongLong(number); });
}

void set_attribute(PyObject* object, const char* name, PyObject* value) {
  const Owned owned(value);
  if (PyObject_SetAttrString(object, name, value) != 0) throw PythonError();
}

std::string read_text(PyObject* object, const char* name) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &size) : nullptr;
  if (text == nullptr) {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_TypeError, (std::string(name) + " must be a str").c_str());
    throw PythonError();
  }
  return std::string(text, static_cast<size_t>(size));
}

namespace {

void set_item(PyObject* module, const char* dictionary, const std::string& name, PyObject* value) {
  const Owned owned(value);
  const Owned items(PyObject_GetAttrString(module, dictionary));
  if (PyDict_SetItemString(items.get(), name.c_str(), value) != 0) throw PythonError();
}

}  // namespace

void add_function(PyObject* module, const std::string& name, size_t num_arguments, NativeCall call) {
  auto entry = std::make_unique<Entry>();
  entry->name = name;
  entry->num_arguments = num_arguments;
  entry->call = std::move(call);
  entry->definition = {entry->name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_entry)),
                       METH_FASTCALL, nullptr};
  const Owned self(PyCapsule_New(entry.get(), nullptr, nullptr));
  set_attribute(module, name.c_str(), PyCFunction_NewEx(&entry->definition, self.get(), nullptr));
  entries().push_back(std::move(entry));
}

void add_entry(PyObject* module, const std::string& name, std::vector<std::string> argument_names, NativeCall call) {
  set_item(module, "argument_names", name, to_python(argument_names));
  add_function(module, name, argument_names.size(), std::move(call));
}

void set_aligned_arguments(PyObject* module, const std::string& name, const std::vector<std::string>& names) {
  set_item(module, "aligned_arguments", name, to_python(names));
}

void add_native_calls(PyObject* module) {
  set_attribute(module, "argument_names", PyDict_New());
  set_attribute(module, "aligned_arguments", PyDict_New());  // of CUDA entry points, by name
  add_function(module, "use_exchange", 1,
               [](PyObject* const* arguments) { return PyBool_FromLong(use_exchange(arguments[0])); });
}

}  // namespace topgather
