#include "freenet.h"

#include <cstring>
#include <initializer_list>

#include "gemm.h"
#include "layer_norm.h"
#include "memory.h"
#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

constexpr int64_t kTokens = 64;  // of a block: 12 to 52 KiB for each array of it; weights are read once a block
constexpr int W = kWidth<float>;

enum Weight { proj_w, proj_b, norm1_w, norm1_b, fc1_w, fc1_b, fc2_w, fc2_b, norm2_w, norm2_b };

// Rows of arrays that products read are padded: to whole vectors, and by one more, so that rows of 256 or 512 values do
// not all fall into the same cache sets. Values beyond D are zero throughout.
int64_t padded(int64_t width) { return (width + 15) / 16 * 16 + 16; }

// Within the kernel a token's values lie channel by channel, row by row, as an image's do, and move in whole rows.
// Which value of a token the l-th of these is.
int64_t in_token(const Decoder& net, int64_t l) {
  return l % (net.patch * net.patch) * net.C + l / (net.patch * net.patch);
}
// The same of a place among the gradients of all weights, the last of which are those of the final projection.
int64_t in_weights(const Decoder& net, int64_t i) {
  const int64_t last = i - net.R * block_weights(net), matrix = net.L * net.D;
  if (last < 0) return i;
  if (last >= matrix) return i - last + matrix + in_token(net, last - matrix);
  return i - last + in_token(net, last / net.D) * net.D + last % net.D;
}

// The weights as products read them: transposed for the way forward, as they are for the way back, which goes through
// the first layer of each MLP once more.
struct Packed {
  explicit Packed(const Decoder& net, bool backward)
      : net(net), ld(padded(net.D)), ld_out(padded(net.L)),
        memory(net.R * (4 * net.D * ld + 7 * ld) + net.D * ld_out + ld_out + net.L * ld) {
    const int64_t square = net.D * ld;
    float* next = memory;
    for (int64_t r = 0; r < net.R; ++r) {
      for (int w : {proj_w, fc1_w, fc2_w}) {
        if (backward) plain[r][w] = copy(next, weight(r, w), net.D, net.D, ld);
        else turned[r][w] = turn(next, weight(r, w), net.D, net.D, ld);
        next += square;
      }
      if (backward) {
        turned[r][fc1_w] = turn(next, weight(r, fc1_w), net.D, net.D, ld);
        next += square;
      }
      for (int w : {proj_b, norm1_w, norm1_b, fc1_b, fc2_b, norm2_w, norm2_b}) {
        plain[r][w] = copy(next, weight(r, w), 1, net.D, ld);
        next += ld;
      }
    }
    const Buffer<float> ordered(net.L * (net.D + 1));
    for (int64_t l = 0; l < net.L; ++l) {
      const float* out = net.weights[net.R * kBlockTensors] + in_token(net, l) * net.D;
      for (int64_t i = 0; i < net.D; ++i) ordered[l * net.D + i] = out[i];
      ordered[net.L * net.D + l] = net.weights[net.R * kBlockTensors + 1][in_token(net, l)];
    }
    if (backward) {
      out_plain = copy(next, ordered, net.L, net.D, ld);
    } else {
      out_turned = turn(next, ordered, net.L, net.D, ld_out);
      out_bias = copy(next + net.D * ld_out, ordered + net.L * net.D, 1, net.L, ld_out);
    }
  }

  const float* weight(int64_t r, int w) const { return net.weights[r * kBlockTensors + w]; }

  static float* copy(float* to, const float* from, int64_t rows, int64_t width, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < stride; ++i) to[r * stride + i] = i < width ? from[r * width + i] : 0.0f;
    }
    return to;
  }
  static float* turn(float* to, const float* from, int64_t rows, int64_t width, int64_t stride) {
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t r = 0; r < stride; ++r) to[i * stride + r] = r < rows ? from[r * width + i] : 0.0f;
    }
    return to;
  }

  const Decoder& net;
  int64_t ld, ld_out;
  Buffer<float> memory;
  const float* turned[kMaxBlocks][kBlockTensors];
  const float* plain[kMaxBlocks][kBlockTensors];
  const float *out_turned = nullptr, *out_bias = nullptr, *out_plain = nullptr;
};

// y = x w + b over `rows` rows; widths in values, strides a whole number of vectors.
void affine(int64_t rows, int64_t in, int64_t out, const float* x, int64_t ldx, const float* w, int64_t ldw,
            const float* b, float* y, int64_t ldy) {
  gemm<false>(rows, (out + W - 1) / W * W, in, x, ldx, 1, w, ldw, y, ldy, b);
}

// What a block of tokens leaves behind in one recurrent block; all [kTokens, ld] but the scales [kTokens].
struct Trace {
  float *normalised1, *hidden, *before, *active, *normalised2, *scale1, *scale2;
};
constexpr int64_t kTraceArrays = 5;

// The first layer of the MLP: fills `before` and `active` from `hidden`; for the way back `before` becomes GELU's
// slope.
template <bool backward> void first_layer(const Packed& p, int64_t r, int64_t rows, const Trace& t) {
  const int64_t D = p.net.D, ld = p.ld, wide = (D + W - 1) / W * W;
  affine(rows, D, D, t.hidden, ld, p.turned[r][fc1_w], ld, p.plain[r][fc1_b], t.before, ld);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = i * ld; c < i * ld + wide; c += W) {
      const Floats before = load(t.before + c), cdf = normal_cdf(before);
      store(t.active + c, before * cdf);
      if (backward) store(t.before + c, gelu_slope(before, cdf));
    }
  }
}

// One recurrent block on `rows` tokens: reads features x and `state` (null for the first), fills the trace; its
// `hidden` ends as the state that is handed on, and what is only kept for the way back is left out unless `keeps`.
void forward_block(const Packed& p, int64_t r, int64_t rows, const float* x, int64_t ldx, const float* state,
                   bool keeps, const Trace& t) {
  const int64_t D = p.net.D, ld = p.ld, wide = (D + W - 1) / W * W;
  const auto& turned = p.turned[r];
  const auto& plain = p.plain[r];
  affine(rows, D, D, x, ldx, turned[proj_w], ld, plain[proj_b], t.hidden, ld);
  for (int64_t i = 0; i < rows; ++i) {
    float* hidden = t.hidden + i * ld;
    const float* added = state ? state + i * ld : nullptr;
    if (added && p.net.sum) {
      for (int64_t c = 0; c < wide; c += W) store(hidden + c, load(hidden + c) + load(added + c));
      added = nullptr;
    }
    t.scale1[i] = norm_row(hidden, keeps ? t.normalised1 + i * ld : nullptr, plain[norm1_w], plain[norm1_b], added, D);
  }
  first_layer<false>(p, r, rows, t);
  gemm<true>(rows, wide, D, t.active, ld, 1, turned[fc2_w], ld, t.hidden, ld, plain[fc2_b]);
  for (int64_t i = 0; i < rows; ++i) {
    t.scale2[i] = norm_row(t.hidden + i * ld, keeps ? t.normalised2 + i * ld : nullptr, plain[norm2_w], plain[norm2_b],
                           nullptr, D);
  }
}

// The part of a trace that is kept, D values a token and not padded: written to `kept`.
void keep(const Packed& p, int64_t rows, const Trace& t, float* kept, bool stream) {
  const int64_t D = p.net.D;
  for (const float* array : {t.normalised1, t.normalised2}) {
    for (int64_t i = 0; i < rows; ++i, kept += D) {
      write_out(kept, array + i * p.ld, D * static_cast<int64_t>(sizeof(float)), stream);
    }
  }
  for (const float* scale : {t.scale1, t.scale2}) {
    for (int64_t i = 0; i < rows; ++i) *kept++ = scale[i];
  }
}

// What a norm's result was: its weight times what it normalised, plus its bias.
Floats normed(const float* normalised, const float* w, const float* b) { return load(normalised) * load(w) + load(b); }

// Reads what was kept of block r from `kept`, and fills the rest of its trace as the way forward did; in place of the
// MLP's values before GELU stand the slopes there. `kept` is of all blocks of these tokens.
void retrace(const Packed& p, int64_t r, int64_t rows, const float* kept, const Trace& t) {
  const int64_t D = p.net.D, ld = p.ld, wide = (D + W - 1) / W * W, row = D * static_cast<int64_t>(sizeof(float));
  const auto& plain = p.plain[r];
  const int64_t one = kept_of_block(p.net, rows);
  const float* own = kept + r * one;
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(t.normalised1 + i * ld, own + i * D, static_cast<size_t>(row));
    std::memcpy(t.normalised2 + i * ld, own + (rows + i) * D, static_cast<size_t>(row));
    t.scale1[i] = own[2 * rows * D + i];
    t.scale2[i] = own[2 * rows * D + rows + i];
  }
  const bool adds = r > 0 && !p.net.sum;  // LN1(P) + Z, with Z the state before
  for (int64_t i = 0; i < rows; ++i) {
    float* hidden = t.hidden + i * ld;
    if (adds) std::memcpy(hidden, own - one + (rows + i) * D, static_cast<size_t>(row));
    for (int64_t c = 0; c < wide; c += W) {
      const Floats state =
          adds ? normed(hidden + c, p.plain[r - 1][norm2_w] + c, p.plain[r - 1][norm2_b] + c) : Floats{};
      store(hidden + c, normed(t.normalised1 + i * ld + c, plain[norm1_w] + c, plain[norm1_b] + c) + state);
    }
  }
  first_layer<true>(p, r, rows, t);
}

// The last state, from what was kept of the last block.
void last_state(const Packed& p, int64_t rows, const float* kept, float* state) {
  const int64_t D = p.net.D, r = p.net.R - 1, wide = (D + W - 1) / W * W;
  const float* normalised = kept + r * kept_of_block(p.net, rows) + rows * D;
  for (int64_t i = 0; i < rows; ++i) {
    float* to = state + i * p.ld;
    std::memcpy(to, normalised + i * D, static_cast<size_t>(D) * sizeof(float));
    for (int64_t c = 0; c < wide; c += W) {
      store(to + c, normed(to + c, p.plain[r][norm2_w] + c, p.plain[r][norm2_b] + c));
    }
  }
}

// Copies the values of tokens from their places in the images, or to them.
template <bool to_images, class Side>
void move_tokens(const Decoder& net, int64_t first, int64_t rows, float* tokens, int64_t ld, float* images, Side P) {
  const int64_t width = net.columns * P, plane = net.J / net.columns * P * width;
  for (int64_t index = first; index < first + rows; ++index) {
    const int64_t n = index / net.J, j = index % net.J;
    float* image = images + n * net.C * plane + j / net.columns * P * width + j % net.columns * P;
    float* token = tokens + (index - first) * ld;
    for (int64_t c = 0; c < net.C; ++c, image += plane - P * width) {
      for (int64_t y = 0; y < P; ++y, image += width, token += P) {
        std::memcpy(to_images ? image : token, to_images ? token : image, static_cast<size_t>(P) * sizeof(float));
      }
    }
  }
}
template <bool to_images>
void move_tokens(const Decoder& net, int64_t first, int64_t rows, float* tokens, int64_t ld, float* images) {
  if (net.patch == 4) move_tokens<to_images>(net, first, rows, tokens, ld, images, Fixed<4>());
  else if (net.patch == 8) move_tokens<to_images>(net, first, rows, tokens, ld, images, Fixed<8>());
  else move_tokens<to_images>(net, first, rows, tokens, ld, images, net.patch);
}

// Memory of one thread: `traces` of them, and extra arrays [kTokens, ld].
struct Workspace {
  // Zeros, as padding is read by products and never written.
  Workspace(const Packed& p, int64_t traces, int64_t arrays)
      : memory(kTokens * (traces * (kTraceArrays * p.ld + 2) + arrays * p.ld + p.ld_out), true) {
    const int64_t array = kTokens * p.ld;
    float* next = memory;
    for (int64_t r = 0; r < traces; ++r) {
      for (float** field :
           {&trace[r].normalised1, &trace[r].hidden, &trace[r].before, &trace[r].active, &trace[r].normalised2}) {
        *field = next;
        next += array;
      }
      trace[r].scale1 = next;
      trace[r].scale2 = next + kTokens;
      next += 2 * kTokens;
    }
    for (int64_t a = 0; a < arrays; ++a, next += array) extra[a] = next;
    tokens = next;
  }

  Buffer<float> memory;
  Trace trace[2];
  float* extra[4];
  float* tokens;  // [kTokens, ld_out]
};

// d_w [out, in] += d^T x, d_b [out] += the sum of the rows of d.
void add_outer(int64_t rows, int64_t out, int64_t in, const float* d, int64_t ldd, const float* x, int64_t ldx,
               float* d_w, float* d_b) {
  gemm<true>(out, in, rows, d, 1, ldd, x, ldx, d_w, in);
  for (int64_t i = 0; i < out; i += W) {
    Floats sum{};
    for (int64_t t = 0; t < rows; ++t) sum += load(d + t * ldd + i);
    const int64_t count = out - i < W ? out - i : W;
    store_some(d_b + i, load_some(d_b + i, count) + sum, count);
  }
}

// The way back through one block: `d` [rows, ld] is the gradient of its state and becomes that of the state before.
// Adds to d_x [rows, ld], which the last block begins, and to the weights' gradients at `g`.
void backward_block(const Packed& p, int64_t r, int64_t rows, const float* x, int64_t ldx, const Trace& t, float* d,
                    float* d_x, float* a, float* b, float* g) {
  const int64_t D = p.net.D, ld = p.ld, wide = (D + W - 1) / W * W, square = D * D;
  const auto& plain = p.plain[r];
  float *proj = g, *proj_bias = proj + square, *n1 = proj_bias + D, *n1_bias = n1 + D, *fc1 = n1_bias + D,
        *fc1_bias = fc1 + square, *fc2 = fc1_bias + D, *fc2_bias = fc2 + square, *n2 = fc2_bias + D, *n2_bias = n2 + D;
  for (int64_t i = 0; i < rows; ++i) {
    float* row = d + i * ld;
    norm_row_backward(row, row, t.normalised2 + i * ld, plain[norm2_w], t.scale2[i], n2, n2_bias, D);
  }
  add_outer(rows, D, D, d, ld, t.active, ld, fc2, fc2_bias);
  gemm<false>(rows, wide, D, d, ld, 1, plain[fc2_w], ld, a, ld);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < wide; c += W) {
      store(a + i * ld + c, load(a + i * ld + c) * load(t.before + i * ld + c));
    }
  }
  add_outer(rows, D, D, a, ld, t.hidden, ld, fc1, fc1_bias);
  gemm<true>(rows, wide, D, a, ld, 1, plain[fc1_w], ld, d, ld);
  for (int64_t i = 0; i < rows; ++i) {
    norm_row_backward(d + i * ld, b + i * ld, t.normalised1 + i * ld, plain[norm1_w], t.scale1[i], n1, n1_bias, D);
    for (int64_t c = 0; r > 0 && p.net.sum && c < wide; c += W) store(d + i * ld + c, load(b + i * ld + c));
  }
  add_outer(rows, D, D, b, ld, x, ldx, proj, proj_bias);
  if (r == p.net.R - 1) gemm<false>(rows, wide, D, b, ld, 1, plain[proj_w], ld, d_x, ld);
  else gemm<true>(rows, wide, D, b, ld, 1, plain[proj_w], ld, d_x, ld);
}

}  // namespace

void decode(const Decoder& net, float* images, float* kept) {
  const Packed p(net, false);
  const int64_t kept_bytes = kept ? kept_values(net) * static_cast<int64_t>(sizeof(float)) : 0;
  const bool stream = kept_bytes > kStreamBytes;
  if (stream) prefer_large_pages(kept, kept_bytes);
  const int64_t tokens = net.N * net.J, blocks = (tokens + kTokens - 1) / kTokens;
  const int64_t bytes = tokens * net.L * static_cast<int64_t>(sizeof(float));
  if (bytes > kStreamBytes) prefer_large_pages(images, bytes);
  parallel_for(net.threads, blocks, 4, [&](int64_t begin, int64_t end) {
    Workspace w(p, 2, 0);  // a block reads the state of the one before: two traces, in turns
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTokens, rows = first + kTokens < tokens ? kTokens : tokens - first;
      const float* x = net.features + first * net.D;
      const float* state = nullptr;
      float* const next = kept ? kept + net.R * kept_of_block(net, first) : nullptr;
      for (int64_t r = 0; r < net.R; ++r) {
        const Trace& trace = w.trace[r % 2];
        forward_block(p, r, rows, x, net.D, state, kept != nullptr, trace);
        if (kept) keep(p, rows, trace, next + r * kept_of_block(net, rows), stream);
        state = trace.hidden;
      }
      affine(rows, net.D, net.L, state ? state : x, state ? p.ld : net.D, p.out_turned, p.ld_out, p.out_bias, w.tokens,
             p.ld_out);
      move_tokens<true>(net, first, rows, w.tokens, p.ld_out, images);
    }
    finish_stream(stream);
  });
}

void decode_backward(const Decoder& net, const float* d_images, const float* kept, float* d_features, float* d_weights,
                     float* partial) {
  const Packed p(net, true);
  const int64_t D = net.D, ld = p.ld, tokens = net.N * net.J, blocks = (tokens + kTokens - 1) / kTokens;
  const int64_t one = block_weights(net), count = all_weights(net);
  const int64_t row = D * static_cast<int64_t>(sizeof(float));
  const bool stream = tokens * row > kStreamBytes;
  if (stream) prefer_large_pages(d_features, tokens * row);
  const int64_t parts = decoder_parts(net), wide = (D + W - 1) / W * W;
  parallel_for(net.threads, parts, 1, [&](int64_t begin, int64_t end) {
    Workspace w(p, 1, 4);
    const Trace& trace = w.trace[0];
    float *d = w.extra[0], *d_x = w.extra[1];
    for (int64_t part = begin; part < end; ++part) {
      float* sums = partial + part * count;
      for (int64_t i = 0; i < count; ++i) sums[i] = 0;
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
        const int64_t first = block * kTokens, rows = first + kTokens < tokens ? kTokens : tokens - first;
        const float* x = net.features + first * D;
        const float* own = kept + net.R * kept_of_block(net, first);
        if (net.R) last_state(p, rows, own, trace.hidden);
        move_tokens<false>(net, first, rows, w.tokens, p.ld_out, const_cast<float*>(d_images));
        float* last = sums + net.R * one;
        add_outer(rows, net.L, D, w.tokens, p.ld_out, net.R ? trace.hidden : x, net.R ? ld : D, last, last + net.L * D);
        gemm<false>(rows, wide, net.L, w.tokens, p.ld_out, 1, p.out_plain, ld, d, ld);
        for (int64_t r = net.R - 1; r >= 0; --r) {
          retrace(p, r, rows, own, trace);
          backward_block(p, r, rows, x, D, trace, d, d_x, w.extra[2], w.extra[3], sums + r * one);
        }
        for (int64_t i = 0; i < rows; ++i) {
          write_out(d_features + (first + i) * D, (net.R ? d_x : d) + i * ld, row, stream);
        }
      }
    }
    finish_stream(stream);
  });
  parallel_for(net.threads, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + i];
      d_weights[in_weights(net, i)] = sum;
    }
  });
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
