// The extension module: what was built, what runs, and every op's bindings.
//
// Written against Python's limited API (Py_LIMITED_API), so that one module serves every CPython from 3.10 on. A build
// for a free-threaded Python, which has none before 3.15, is its own, and says that it needs no interpreter lock: an
// entry point reads its arguments, which no other thread changes, and keeps no state between calls.
#include "bindings.h"
#include "common/cache_size.h"
#include "common/cpu_target.h"
#include "common/native_call.h"
#include "common/parallel.h"
#include "cuda/device.h"

namespace {

using namespace topgather;

void fill(PyObject* module) {
  set_attribute(module, "compiler", to_python(TOPGATHER_COMPILER));
  set_attribute(module, "build_type", to_python(TOPGATHER_BUILD_TYPE));
#if defined(TOPGATHER_HAVE_CUDA)
  set_attribute(module, "has_cuda", PyBool_FromLong(1));
#else
  set_attribute(module, "has_cuda", PyBool_FromLong(0));
#endif
  add_function(module, "cpu_target", 0, [](PyObject* const*) { return to_python(name_of(cpu_target())); });
  add_function(module, "set_cpu_target", 1, [](PyObject* const* arguments) -> PyObject* {
    set_cpu_target(read_text(arguments[0], "cpu target"));
    return nullptr;
  });
  add_function(module, "available_cpu_targets", 0, [](PyObject* const*) {
    std::vector<std::string> names;
    for (const CpuTarget target : available_cpu_targets()) names.push_back(name_of(target));
    return to_python(names);
  });
  add_function(module, "count_tasks", 1,
               [](PyObject* const* arguments) { return to_python(count_tasks(PyObject_IsTrue(arguments[0]) == 1)); });
  add_function(module, "assume_last_level_cache", 1, [](PyObject* const* arguments) -> PyObject* {
    const int64_t num_bytes = PyLong_AsLongLong(arguments[0]);
    if (PyErr_Occurred() != nullptr) throw PythonError();
    assume_last_level_cache(num_bytes);
    return nullptr;
  });
  add_function(module, "cuda_architectures", 0, [](PyObject* const*) { return to_python(cuda_architectures()); });
  add_function(module, "cuda_toolkit", 0, [](PyObject* const*) { return to_python(cuda_toolkit()); });
  add_function(module, "cuda_devices", 0, [](PyObject* const*) { return to_python(cuda_devices()); });
  add_native_calls(module);
  OpBindings::add_all(module);
}

int execute(PyObject* module) {
  try {
    fill(module);
    return 0;
  } catch (const PythonError&) {
    return -1;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return -1;
  }
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(&execute)},
#if defined(Py_GIL_DISABLED)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_native",
    "Compiled kernels of topgather. Takes addresses and strides; use the functions of topgather instead.",
    0,
    nullptr,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&definition); }
