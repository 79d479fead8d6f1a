// The one file that knows Python. Its callers have checked shapes, dtypes and devices and allocated the results; here are
// addresses (0 for "not wanted") and sizes. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "isa.h"
#include "parallel.h"
#include "topk.h"

namespace py = pybind11;
using namespace speedk;

namespace {

template <class T = void> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

bool topk(int dtype, uintptr_t scm, int64_t rows, int64_t J, int64_t K, int64_t k, uintptr_t dense, uintptr_t mask,
          uintptr_t values, uintptr_t row_index, uintptr_t col_index, int index_bytes, int threads) {
  const Topk job{static_cast<Dtype>(dtype), at(scm), rows, J, K, k, at(dense), at<bool>(mask), at(values),
                 at(row_index), at(col_index), index_bytes, threads};
  return SPEEDK_CALL(topk, job);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of speedk; use them through speedk.ops.";
  const py::call_guard<py::gil_scoped_release> released;
  m.def("isa", [] { return isa_name(); });
  m.def("parallel_backend", [] { return parallel_backend(); });
#ifdef SPEEDK_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  m.def("topk", &topk, released);
}
