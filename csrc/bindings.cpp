// The one file that knows Python. Callers have checked shapes, dtypes and devices; here are raw pointers and sizes.
#include <pybind11/pybind11.h>

#include "parallel.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of speedk; use them through speedk.ops.";
  m.def("parallel_backend", [] { return speedk::parallel_backend(); });
#ifdef SPEEDK_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
