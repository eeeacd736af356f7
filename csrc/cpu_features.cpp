// _cpu: what this processor can do and of which interface the libraries are, asked before one of them is loaded. Plain limited
// API, no torch.
#undef Py_LIMITED_API  // torch's build adds its own
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "cpu/amx.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

PyObject* features(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  bool ok = true;
  [[maybe_unused]] auto add = [&](const char* name, bool present) {
    if (!present || !ok) return;
    PyObject* text = PyUnicode_FromString(name);
    ok = text != nullptr && PyList_Append(names, text) == 0;
    Py_XDECREF(text);
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // GCC 10 cannot ask for f16c by name
  add("avx2", __builtin_cpu_supports("avx2"));
  add("fma", __builtin_cpu_supports("fma"));
  add("f16c", __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C));
  add("avx512f", __builtin_cpu_supports("avx512f"));
  add("avx512bw", __builtin_cpu_supports("avx512bw"));
  add("avx512dq", __builtin_cpu_supports("avx512dq"));
  add("avx512vl", __builtin_cpu_supports("avx512vl"));
  const bool dots = __builtin_cpu_supports("avx512bf16");
  add("avx512bf16", dots);
  // Intel's cores (seen on family 6, model 207) begin a dot product of bfloat16 every other cycle, and two multiply-adds of
  // float in each cycle: half as many products.
  add("slow-avx512bf16", dots && __builtin_cpu_is("intel"));
  const bool leaf = __get_cpuid_count(7, 0, &a, &b, &c, &d);  // of the tiles GCC 10 knows no names
  const bool tiles = leaf && (d & 1u << 24) && (d & 1u << 22) && segnext::amx::permitted();
  add("amx-tile", tiles);
  add("amx-bf16", tiles);
#endif
  if (ok) return names;
  Py_DECREF(names);
  return nullptr;
}

PyMethodDef methods[] = {
    {"features", features, METH_NOARGS, "The processor's vector extensions, by GCC's names, and slow- those not worth using."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  PyObject* created = PyModule_Create(&module);
  if (created != nullptr && PyModule_AddIntConstant(created, "INTERFACE", SEGNEXT_INTERFACE) == 0) return created;
  Py_XDECREF(created);
  return nullptr;
}
