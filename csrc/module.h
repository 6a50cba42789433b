// What makes a binary importable from Python.
#pragma once

#include <Python.h>

#define KDFAST_JOINED(a, b) a##b
#define KDFAST_NAMED(prefix, name) KDFAST_JOINED(prefix, name)

// Defines the module the binary is named after, once in each. Importing it runs the binary's registrations; it is empty.
#define KDFAST_EMPTY_MODULE() \
  PyMODINIT_FUNC KDFAST_NAMED(PyInit_, TORCH_EXTENSION_NAME)() { \
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "kdfast", nullptr, -1, nullptr, \
                                 nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&module); \
  }
