// The one file that knows Python. Its callers have checked shapes, dtypes and devices and allocated the results; here
// are addresses (0 for "not wanted") and sizes, which have to go together. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "coo.h"
#include "freenet.h"
#include "freenet_block.h"
#include "isa.h"
#include "linear_backward.h"
#include "mhsc.h"
#include "norm_act_pool.h"
#include "parallel.h"
#include "patches.h"
#include "row_products.h"
#include "topk.h"
#include "unroll_step.h"

#include <stdexcept>
#include <vector>

namespace py = pybind11;
using namespace speedk;

namespace {

template <class T = void> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// What the kernels would follow out of bounds; a ValueError in Python.
void require(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

Topk topk(int dtype, uintptr_t scm, int64_t rows, int64_t J, int64_t K, int64_t k, uintptr_t dense, uintptr_t mask,
          uintptr_t values, uintptr_t row_index, uintptr_t col_index, int index_bytes, int threads) {
  require(rows >= 0 && J >= 0 && K >= 0 && (K == 0 || J <= kMaxEntries / K), "a matrix has 0 to 2^30 entries");
  require(k >= 0 && k <= J * K, "k is outside 0 to J K");
  const int64_t below = index_bytes == 1 ? 256 : index_bytes == 2 ? 65536 : 0;
  require(!row_index || (J <= below && K <= below), "an index does not fit its type");
  return {static_cast<Dtype>(dtype), at(scm), rows, J, K, k, at(dense), at<bool>(mask), at(values),
          at(row_index), at(col_index), index_bytes, threads};
}

Entries entries(int dtype, uintptr_t values, uintptr_t rows, uintptr_t cols, int index_bytes, int64_t matrices,
                int64_t k, int64_t J, int64_t K) {
  require(index_bytes == 1 || index_bytes == 2, "indices are of 8 or 16 bits");
  require(matrices >= 0 && k >= 0 && J >= 0 && K >= 0, "entries have a negative size");
  return {static_cast<Dtype>(dtype), at(values), at(rows), at(cols), index_bytes, matrices, k, J, K};
}

// A Decoder that owns its list of addresses.
struct Net {
  std::vector<const float*> weights;
  Decoder decoder;

  Net(int64_t N, int64_t J, int64_t D, int64_t R, int64_t C, int64_t patch, int64_t columns, bool sum,
      uintptr_t features, int64_t H, int64_t K, uintptr_t scm, uintptr_t saet, const std::vector<uintptr_t>& addresses,
      int threads) {
    require(N >= 0 && D >= 0 && C >= 0 && patch > 0 && K >= 0, "a decoder has a negative size");
    require(J == columns * columns, "the patches of a decoder do not make a square");
    require(R >= 0 && R <= kMaxBlocks, "a decoder has 0 to 64 blocks");
    require(H > 0 ? D % H == 0 : H == 0 && K == 0, "a decoder has features, or codes of D / H values a head");
    require(static_cast<int64_t>(addresses.size()) == R * kBlockTensors + 2,
            "a decoder has ten weights a block and two");
    for (const uintptr_t address : addresses) weights.push_back(at<const float>(address));
    decoder = {N,   J,       D,   patch * patch * C, R, C, patch, columns, sum, at<const float>(features),
               {Dtype::float32, N, H, J, K, D, at(scm), at(saet), threads}, weights.data(), threads};
  }
  Net(const Net&) = delete;
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of speedk; use them through speedk.ops.";
  const py::call_guard<py::gil_scoped_release> released;
  m.def("isa", [] { return isa_name(); });
  m.def("matrix_unit", &matrix_unit);
  m.def("use_matrix_unit", &use_matrix_unit);
  m.def("parallel_backend", [] { return parallel_backend(); });
#ifdef SPEEDK_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  py::class_<Topk>(m, "Topk").def(py::init(&topk));
  m.attr("topk_entries") = kMaxEntries;
  m.attr("decoder_blocks") = kMaxBlocks;
  m.attr("decoder_least_for_unit") = kLeastForUnit;
  m.def("topk", [](const Topk& job) { return SPEEDK_CALL(topk, job); }, released);
#ifdef SPEEDK_CUDA
  m.def("topk_cuda", [](const Topk& job, uintptr_t nan, uintptr_t stream) {
    return topk_cuda(job, at<int>(nan), at(stream));
  }, released);
#endif

  py::class_<Entries>(m, "Entries").def(py::init(&entries));
  m.def("coo_decode", [](const Entries& e, uintptr_t dense, int threads) {
    return SPEEDK_CALL(coo_decode, e, at(dense), threads);
  }, released);
  m.def("coo_decode_backward", [](const Entries& e, uintptr_t d_dense, uintptr_t d_values, int threads) {
    return SPEEDK_CALL(coo_decode_backward, e, at(d_dense), at(d_values), threads);
  }, released);
  m.def("mhsc_coo", [](const Entries& e, uintptr_t saet, int64_t H, int64_t D, uintptr_t out, int threads) {
    require(H > 0 && D % H == 0 && e.matrices % H == 0, "D or the matrices are not a multiple of H heads");
    return SPEEDK_CALL(mhsc_coo, e, at(saet), H, D, at(out), threads);
  }, released);
  m.attr("parts") = kParts;
  m.def("mhsc_coo_backward", [](const Entries& e, uintptr_t saet, uintptr_t d_out, int64_t H, int64_t D,
                                uintptr_t d_values, uintptr_t d_saet, uintptr_t partial, int threads) {
    require(H > 0 && D % H == 0 && e.matrices % H == 0, "D or the matrices are not a multiple of H heads");
    return SPEEDK_CALL(mhsc_coo_backward, e, at(saet), at(d_out), H, D, at(d_values), at(d_saet), at(partial), threads);
  }, released);

  py::class_<Mhsc>(m, "Mhsc").def(py::init([](int dtype, int64_t N, int64_t H, int64_t J, int64_t K, int64_t D,
                                             uintptr_t scm, uintptr_t saet, int threads) {
    require(H > 0 && D % H == 0, "D is not a multiple of H heads");
    return Mhsc{static_cast<Dtype>(dtype), N, H, J, K, D, at(scm), at(saet), threads};
  }));
  m.attr("mhsc_parts") = kMhscParts;
  m.def("mhsc", [](const Mhsc& job, uintptr_t out) { SPEEDK_CALL(mhsc, job, at(out)); }, released);
  m.def("mhsc_backward", [](const Mhsc& job, uintptr_t d_out, uintptr_t d_scm, uintptr_t d_saet, uintptr_t partial) {
    SPEEDK_CALL(mhsc_backward, job, at(d_out), at(d_scm), at(d_saet), at(partial));
  }, released);

  py::class_<Net>(m, "Net")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, uintptr_t, int64_t, int64_t,
                    uintptr_t, uintptr_t, const std::vector<uintptr_t>&, int>())
      .def_property_readonly("kept", [](const Net& net) {
        return kept_of(net.decoder, net.decoder.N * net.decoder.J);
      })
      .def_property_readonly("partial", [](const Net& net) {
        return decoder_parts(net.decoder) * all_weights(net.decoder);
      });
  m.def("decode", [](const Net& net, uintptr_t images, uintptr_t kept) {
    SPEEDK_CALL(decode, net.decoder, at<float>(images), at<float>(kept));
  }, released);
  m.def("decode_backward", [](const Net& net, uintptr_t d_images, uintptr_t kept, uintptr_t d_inputs, bool learned,
                              const std::vector<uintptr_t>& addresses, uintptr_t partial) {
    require(addresses.size() == net.weights.size() + (has_features(net.decoder) ? 0 : 1),
            "each weight has a gradient, and so have the SAETs");
    std::vector<float*> d_weights;
    for (const uintptr_t address : addresses) d_weights.push_back(at<float>(address));
    SPEEDK_CALL(decode_backward, net.decoder, at<const float>(d_images), at<const float>(kept), at<float>(d_inputs),
                learned, d_weights.data(), at<float>(partial));
  }, released);

  py::class_<FreenetBlock>(m, "FreenetBlock")
      .def(py::init([](int dtype, bool tf32, bool sum, int64_t M, int64_t D, uintptr_t features, uintptr_t state,
                       const std::vector<uintptr_t>& addresses, double eps) {
        require(M >= 0 && D == kBlockWidth, "there is no kernel for blocks of this D");
        require(addresses.size() == 10, "a block has ten weights");
        FreenetBlock job{static_cast<Dtype>(dtype), tf32, sum, M, D, at(features), at(state), {}, eps};
        for (int i = 0; i < 10; ++i) job.weights[i] = at(addresses[i]);
        return job;
      }));
  m.attr("block_width") = kBlockWidth;
  m.def("block_bytes", [](int dtype) { return block_bytes(static_cast<Dtype>(dtype)); });
  m.attr("block_tokens") = kBlockTokens;
  py::class_<RowProducts>(m, "RowProducts")
      .def(py::init([](int dtype, bool tf32, int64_t M, const std::vector<uintptr_t>& left,
                       const std::vector<uintptr_t>& right) {
        require(M >= 0, "products are of tokens");
        require(left.size() == right.size() && left.size() <= kMostProducts, "at most three products at a time");
        RowProducts job{static_cast<Dtype>(dtype), tf32, static_cast<int>(left.size()), M, {}, {}};
        for (size_t i = 0; i < left.size(); ++i) job.left[i] = at(left[i]), job.right[i] = at(right[i]);
        return job;
      }));
  py::class_<LinearBackward>(m, "LinearBackward")
      .def(py::init([](bool tf32, int64_t images, int64_t parts, int64_t J, int64_t K, int64_t W, uintptr_t inputs,
                       uintptr_t weight, int64_t part, int64_t of_k, int64_t of_column, uintptr_t d_tokens,
                       int64_t patch, int64_t side) {
        require(images >= 0 && parts > 0 && J >= 0 && J % kLinearTokens == 0, "no whole number of tokens' tiles");
        require(linear_slice(K, W, patch, side) > 0, "there is no kernel for these sizes");
        require(patch == 0 || (parts == 1 && J == side * side && of_k == 1 && of_column == K),
                "patches make a square, and their weight is [W, K]");
        return LinearBackward{tf32, images, parts, J, K, W, at<const float>(inputs), at<const float>(weight), part,
                              of_k, of_column, at<const float>(d_tokens), patch, side, nullptr};
      }));
  m.def("linear_programs", &linear_programs);
  m.def("linear_slice", &linear_slice);
  m.def("linear_bytes", &linear_bytes);
#ifdef SPEEDK_CUDA
  // The first address is of a tensor that `launch` finds the GPU by.
  m.def("linear_backward_cuda", [](LinearBackward job, uintptr_t, uintptr_t d_inputs, uintptr_t partial, int64_t size,
                                   int64_t splits, uintptr_t stream) {
    job.d_inputs = at<float>(d_inputs);
    return linear_backward_cuda(job, at<float>(partial), size, splits, at(stream));
  }, released);
  m.def("freenet_block_cuda", [](const FreenetBlock& job, uintptr_t out, uintptr_t stream) {
    return freenet_block_cuda(job, at(out), at(stream));
  }, released);
  m.def("freenet_block_backward_cuda", [](const FreenetBlock& job, uintptr_t d_out, uintptr_t d_features,
                                          uintptr_t d_state, uintptr_t factors, uintptr_t sums, int64_t size,
                                          bool more, uintptr_t stream) {
    return freenet_block_backward_cuda(job, at(d_out), at(d_features), at(d_state), at(factors), size,
                                       at<float>(sums), more, at(stream));
  }, released);
  m.def("row_products_cuda", [](const RowProducts& job, uintptr_t partial, int64_t splits, bool more,
                                uintptr_t stream) {
    return row_products_cuda(job, at<float>(partial), splits, more, at(stream));
  }, released);
  m.def("sum_rows_cuda", [](int dtype, uintptr_t partial, uintptr_t out, uintptr_t rest, int64_t rows, int64_t size,
                            int64_t first, uintptr_t stream) {
    require(first == size || rest, "the values beyond the first ones have a place");
    return sum_rows_cuda(static_cast<Dtype>(dtype), at<const float>(partial), rows, size, first, at(out), at(rest),
                         at(stream));
  }, released);
#endif

  py::class_<Patches>(m, "Patches").def(py::init([](int element_bytes, int64_t N, int64_t C, int64_t rows,
                                                   int64_t columns, int64_t patch) {
    require(N >= 0 && C >= 0 && rows >= 0 && columns >= 0 && patch > 0, "patches have a negative size");
    return Patches{element_bytes, N, C, rows, columns, patch};
  }));
  m.def("patchify", [](const Patches& shape, uintptr_t images, uintptr_t tokens, int threads) {
    SPEEDK_CALL(patchify, shape, at(images), at(tokens), threads);
  }, released);
  m.def("unpatchify", [](const Patches& shape, uintptr_t tokens, uintptr_t images, int threads) {
    SPEEDK_CALL(unpatchify, shape, at(tokens), at(images), threads);
  }, released);

  py::class_<NormActPool>(m, "NormActPool")
      .def(py::init([](int dtype, bool channels_last, uintptr_t x, uintptr_t weight, uintptr_t bias, int64_t B,
                       int64_t C, int64_t H, int64_t W, double eps) {
        require(H > 1 && W > 1, "an image to be pooled is 2x2 at least");
        return NormActPool{static_cast<Dtype>(dtype), channels_last, at(x), at(weight), at(bias), B, C, H, W, eps};
      }));
  m.def("norm_act_pool", [](const NormActPool& job, uintptr_t out, uintptr_t mean, uintptr_t rstd, int threads) {
    SPEEDK_CALL(norm_act_pool, job, at(out), at(mean), at(rstd), threads);
  }, released);
  m.def("norm_act_pool_backward", [](const NormActPool& job, uintptr_t d_out, uintptr_t mean, uintptr_t rstd,
                                     uintptr_t d_x, uintptr_t d_weight, uintptr_t d_bias, int threads) {
    SPEEDK_CALL(norm_act_pool_backward, job, at(d_out), at(mean), at(rstd), at(d_x), at(d_weight), at(d_bias), threads);
  }, released);
  m.def("norm_act_pool_double_backward", [](const NormActPool& job, uintptr_t d_out, uintptr_t mean, uintptr_t rstd,
                                            uintptr_t dd_x, uintptr_t dd_weight, uintptr_t dd_bias, uintptr_t d_d_out,
                                            uintptr_t d_x, uintptr_t d_weight, int threads) {
    const NormActPoolSecond second{at(d_out), at(mean), at(rstd), at(dd_x), at(dd_weight), at(dd_bias), at(d_d_out),
                                   at(d_x), at(d_weight)};
    SPEEDK_CALL(norm_act_pool_double_backward, job, second, threads);
  }, released);
#ifdef SPEEDK_CUDA
  m.def("norm_act_pool_cuda", [](const NormActPool& job, uintptr_t out, uintptr_t mean, uintptr_t rstd,
                                 uintptr_t stream) {
    return norm_act_pool_cuda(job, at(out), at(mean), at(rstd), at(stream));
  }, released);
  m.def("norm_act_pool_backward_cuda", [](const NormActPool& job, uintptr_t d_out, uintptr_t mean, uintptr_t rstd,
                                          uintptr_t d_x, uintptr_t d_weight, uintptr_t d_bias, uintptr_t stream) {
    return norm_act_pool_backward_cuda(job, at(d_out), at(mean), at(rstd), at(d_x), at(d_weight), at(d_bias),
                                       at(stream));
  }, released);
  m.def("norm_act_pool_double_backward_cuda", [](const NormActPool& job, uintptr_t d_out, uintptr_t mean,
                                                 uintptr_t rstd, uintptr_t dd_x, uintptr_t dd_weight,
                                                 uintptr_t dd_bias, uintptr_t d_d_out, uintptr_t d_x,
                                                 uintptr_t d_weight, uintptr_t stream) {
    const NormActPoolSecond second{at(d_out), at(mean), at(rstd), at(dd_x), at(dd_weight), at(dd_bias), at(d_d_out),
                                   at(d_x), at(d_weight)};
    return norm_act_pool_double_backward_cuda(job, second, at(stream));
  }, released);
#endif

  py::class_<UnrollStep>(m, "UnrollStep").def(py::init([](int dtype, int64_t P, uintptr_t lr, double momentum) {
    return UnrollStep{static_cast<Dtype>(dtype), P, at(lr), momentum};
  }));
  m.def("step_chunks", &step_chunks);
  m.def("unroll_step", [](const UnrollStep& job, uintptr_t theta, uintptr_t momenta, uintptr_t gradient,
                          uintptr_t theta_out, uintptr_t m_out, int threads) {
    SPEEDK_CALL(unroll_step, job, at(theta), at(momenta), at(gradient), at(theta_out), at(m_out), threads);
  }, released);
  m.def("unroll_step_adjoint", [](const UnrollStep& job, uintptr_t d_theta, uintptr_t d_m, uintptr_t momenta,
                                  uintptr_t d_gradient, uintptr_t d_m_out, uintptr_t d_lr, uintptr_t partial,
                                  int threads) {
    SPEEDK_CALL(unroll_step_adjoint, job, at(d_theta), at(d_m), at(momenta), at(d_gradient), at(d_m_out), at(d_lr),
                at<double>(partial), threads);
  }, released);
#ifdef SPEEDK_CUDA
  m.def("unroll_step_cuda", [](const UnrollStep& job, uintptr_t theta, uintptr_t momenta, uintptr_t gradient,
                               uintptr_t theta_out, uintptr_t m_out, uintptr_t stream) {
    return unroll_step_cuda(job, at(theta), at(momenta), at(gradient), at(theta_out), at(m_out), at(stream));
  }, released);
  m.def("unroll_step_adjoint_cuda", [](const UnrollStep& job, uintptr_t d_theta, uintptr_t d_m, uintptr_t momenta,
                                       uintptr_t d_gradient, uintptr_t d_m_out, uintptr_t d_lr, uintptr_t partial,
                                       uintptr_t stream) {
    return unroll_step_adjoint_cuda(job, at(d_theta), at(d_m), at(momenta), at(d_gradient), at(d_m_out), at(d_lr),
                                    at<double>(partial), at(stream));
  }, released);
#endif
}
