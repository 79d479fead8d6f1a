#include "freenet.h"

#include <cstring>
#include <initializer_list>

#include "amx.h"
#include "freenet_weights.h"
#include "gemm.h"
#include "layer_norm.h"
#include "memory.h"
#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

constexpr int64_t kTokens = 128;  // of a block: it reads the weights once, if they are many from the last cache
constexpr int W = kWidth<float>;

int64_t whole(int64_t width) { return (width + W - 1) / W * W; }

// What a block of tokens leaves behind in one recurrent block; all [kTokens, ld] but the scales [kTokens].
struct Trace {
  float *normalised1, *hidden, *slope, *active, *normalised2, *scale1, *scale2;
};

// Memory of one thread: for the way forward alone, or for both; and so many traces.
template <class Products> struct Workspace {
  using Scratch = typename Products::Scratch;

  Workspace(const Packed<Products>& p, int64_t traces)
      : memory(lay_out(p, traces, nullptr)),
        sides(left_room(p) + Products::room(kTokens, p.net.D) + 2 * right_room(p)) {
    lay_out(p, traces, memory);
    left = sides;
    x_left = left + left_room(p);
    right = x_left + Products::room(kTokens, p.net.D);
    x_right = right + right_room(p);
  }

  // Says where in `base` what lies, and returns how many values that takes; base may be null, to ask.
  int64_t lay_out(const Packed<Products>& p, int64_t traces, float* base) {
    int64_t taken = 0;
    const auto take = [&](int64_t width, int64_t ld) {
      float* const at = base ? base + taken : nullptr;
      taken += kTokens * ld;
      // Vectors reach into the padding, which stays zero; values are written before they are read.
      for (int64_t i = 0; base && width < ld && i < kTokens; ++i) {
        std::memset(at + i * ld + width, 0, static_cast<size_t>(ld - width) * sizeof(float));
      }
      return at;
    };
    const int64_t D = p.net.D, K = p.net.codes.K;
    for (int64_t r = 0; r < traces; ++r) {
      Trace& t = trace[r];
      for (float** field : {&t.normalised1, &t.hidden, &t.slope, &t.active, &t.normalised2}) *field = take(D, p.ld);
      t.scale1 = take(1, 1);
      t.scale2 = take(1, 1);
    }
    for (float** field : {&x, &state[0], &state[1]}) *field = take(D, p.ld);
    tokens = take(p.net.L, p.ld_out);
    if (p.backward) {
      for (float** field : {&d, &d_x, &a, &b}) *field = take(D, p.ld);
      piece = take(K, K);
    }
    return taken;
  }
  static int64_t left_room(const Packed<Products>& p) {
    const int64_t widest = larger(p.net.D, p.net.L);
    return larger(p.pools.left_room(kTokens), larger(Products::room(kTokens, widest), Products::room(widest, kTokens)));
  }
  static int64_t right_room(const Packed<Products>& p) {
    return larger(p.pools.right_room(kTokens), Products::room(p.net.D, kTokens));
  }

  Buffer<float> memory;
  Buffer<Scratch> sides;
  Trace trace[kMaxBlocks];
  float *x, *state[2], *tokens, *d, *d_x, *a, *b, *piece;
  Scratch *left, *x_left, *right, *x_right;
};

// Calls f(n, j, count, at) for what each image n has of `rows` tokens from `first` on: `count` from j on, the at-th.
template <class F> void each_image(const Decoder& net, int64_t first, int64_t rows, F f) {
  for (int64_t at = 0; at < rows;) {
    const int64_t n = (first + at) / net.J, j = (first + at) % net.J;
    const int64_t count = net.J - j < rows - at ? net.J - j : rows - at;
    f(n, j, count, at);
    at += count;
  }
}

// Where the features of these tokens lie, and the width of their rows: `features`, or in w.x.
struct Features {
  const float* at;
  int64_t ld;
};
template <class Products>
Features features_of(const Packed<Products>& p, int64_t first, int64_t rows, const Workspace<Products>& w) {
  if (has_features(p.net)) return {p.net.features + first * p.net.D, p.net.D};
  each_image(p.net, first, rows, [&](int64_t n, int64_t j, int64_t count, int64_t at) {
    p.pools.features(n, j, count, w.x + at * p.ld, p.ld, w.left);
  });
  return {w.x, p.ld};
}

// The first layer of the MLP: fills `active` from `hidden`, and `slope` for the way back.
template <class Products>
void first_layer(const Packed<Products>& p, int64_t r, int64_t rows, bool keeps, const Trace& t,
                 const Workspace<Products>& w) {
  const int64_t D = p.net.D, ld = p.ld, wide = whole(D);
  Products::multiply(rows, wide, Products::rows(w.left, t.hidden, ld, rows, D), p.turned[r][fc1], t.slope, ld,
                     p.vectors[r][fc1_b]);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = i * ld; c < i * ld + wide; c += W) {
      const Floats before_gelu = load(t.slope + c), cdf = normal_cdf(before_gelu);
      store(t.active + c, before_gelu * cdf);
      if (keeps) store(t.slope + c, gelu_slope(before_gelu, cdf));
    }
  }
}

// One recurrent block: reads the features and `before`, the state it is given (null for the first); writes its state to
// `after`, and to the trace what else is normalised if `normalised`, and the slopes if `slopes`.
template <class Products>
void forward_block(const Packed<Products>& p, int64_t r, int64_t rows, const typename Products::Left& x,
                   const float* before, float* after, bool normalised, bool slopes, const Trace& t,
                   const Workspace<Products>& w) {
  const int64_t D = p.net.D, ld = p.ld, wide = whole(D);
  const auto& matrices = p.turned[r];
  const auto& vectors = p.vectors[r];
  Products::multiply(rows, wide, x, matrices[proj], t.hidden, ld, vectors[proj_b]);
  for (int64_t i = 0; i < rows; ++i) {
    const float* state = before ? before + i * ld : nullptr;
    float* n = normalised ? t.normalised1 + i * ld : nullptr;
    t.scale1[i] = norm_row(t.hidden + i * ld, p.net.sum ? state : nullptr, n, vectors[norm1_w], vectors[norm1_b],
                           p.net.sum ? nullptr : state, D);
  }
  first_layer(p, r, rows, slopes, t, w);
  Products::multiply(rows, wide, Products::rows(w.left, t.active, ld, rows, D), matrices[fc2], after, ld,
                     vectors[fc2_b]);
  for (int64_t i = 0; i < rows; ++i) {
    float* n = normalised ? t.normalised2 + i * ld : nullptr;
    t.scale2[i] = norm_row(after + i * ld, t.hidden + i * ld, n, vectors[norm2_w], vectors[norm2_b], nullptr, D);
  }
}

// Writes the part of a trace that is kept, D values a token and not padded, to `kept`.
void keep(const Decoder& net, int64_t ld, int64_t rows, const Trace& t, float* kept, bool stream) {
  for (const float* array : {t.normalised1, t.normalised2}) {
    for (int64_t i = 0; i < rows; ++i, kept += net.D) {
      write_out(kept, array + i * ld, net.D * static_cast<int64_t>(sizeof(float)), stream);
    }
  }
  for (const float* scale : {t.scale1, t.scale2}) {
    for (int64_t i = 0; i < rows; ++i) *kept++ = scale[i];
  }
}

// The state of block r, from what was `known` of these tokens' blocks.
template <class Products>
void known_state(const Packed<Products>& p, int64_t r, int64_t rows, const float* known, float* state) {
  const int64_t D = p.net.D, wide = whole(D);
  const float* normalised = known + r * kept_of_block(p.net, rows) + rows * D;
  const auto& vectors = p.vectors[r];
  for (int64_t i = 0; i < rows; ++i) {
    float* to = state + i * p.ld;
    std::memcpy(to, normalised + i * D, static_cast<size_t>(D) * sizeof(float));
    for (int64_t c = 0; c < wide; c += W) {
      store(to + c, load(to + c) * load(vectors[norm2_w] + c) + load(vectors[norm2_b] + c));
    }
  }
}

// The trace of block r, as forward_block left it, from what was `known`.
template <class Products>
void retrace_block(const Packed<Products>& p, int64_t r, int64_t rows, const float* known, const Trace& t,
                   const Workspace<Products>& w) {
  const int64_t D = p.net.D, ld = p.ld, wide = whole(D), row = D * static_cast<int64_t>(sizeof(float));
  const float* own = known + r * kept_of_block(p.net, rows);
  const auto& vectors = p.vectors[r];
  const bool adds = r > 0 && !p.net.sum;  // LN1(P) + Z, with Z the state before
  if (adds) known_state(p, r - 1, rows, known, t.hidden);
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(t.normalised1 + i * ld, own + i * D, static_cast<size_t>(row));
    std::memcpy(t.normalised2 + i * ld, own + (rows + i) * D, static_cast<size_t>(row));
    t.scale1[i] = own[2 * rows * D + i];
    t.scale2[i] = own[2 * rows * D + rows + i];
    for (int64_t c = 0; c < wide; c += W) {
      const int64_t at = i * ld + c;
      const Floats normed = load(t.normalised1 + at) * load(vectors[norm1_w] + c) + load(vectors[norm1_b] + c);
      store(t.hidden + at, adds ? normed + load(t.hidden + at) : normed);
    }
  }
  first_layer(p, r, rows, true, t, w);
}

// All blocks; returns the last state, which without blocks is the features, and the width of its rows. Fills `kept`, if
// not null; for the way back, a trace of each block.
template <class Products>
Features forward(const Packed<Products>& p, int64_t rows, const Features& x, const typename Products::Left& x_left,
                 float* kept, bool stream, const Workspace<Products>& w) {
  const float* state = nullptr;
  for (int64_t r = 0; r < p.net.R; ++r) {
    float* after = w.state[r % 2];
    const Trace& t = w.trace[p.backward ? r : 0];
    forward_block(p, r, rows, x_left, state, after, kept || p.backward, p.backward, t, w);
    if (kept) keep(p.net, p.ld, rows, t, kept + r * kept_of_block(p.net, rows), stream);
    state = after;
  }
  return state ? Features{state, p.ld} : x;
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

// d_w [out, in] += d^T x, d_b [out] += the sum of the rows of d.
template <class Products>
void add_outer(int64_t rows, int64_t out, int64_t in, const float* d, int64_t ldd, const typename Products::Right& x,
               float* d_w, float* d_b, const Workspace<Products>& w) {
  Products::add_product(out, in, Products::columns(w.left, d, ldd, rows, out), x, d_w, in);
  for (int64_t i = 0; i < out; i += W) {
    Floats sum{};
    for (int64_t t = 0; t < rows; ++t) sum += load(d + t * ldd + i);
    const int64_t count = out - i < W ? out - i : W;
    store_some(d_b + i, load_some(d_b + i, count) + sum, count);
  }
}

// The way back through one block: w.d is the gradient of its state and becomes that of the state before. Adds to w.d_x,
// which the last block begins, and to the weights' gradients at `g`.
template <class Products>
void backward_block(const Packed<Products>& p, int64_t r, int64_t rows, const typename Products::Right& x,
                    const Trace& t, const Workspace<Products>& w, float* g) {
  const int64_t D = p.net.D, ld = p.ld, wide = whole(D), square = D * D;
  const auto& matrices = p.plain[r];
  const auto& vectors = p.vectors[r];
  const auto right = [&](const float* from) { return Products::right(w.right, from, ld, rows, D); };
  const auto left = [&](const float* from) { return Products::rows(w.left, from, ld, rows, D); };
  float *g_proj = g, *g_proj_b = g_proj + square, *g_norm1 = g_proj_b + D, *g_norm1_b = g_norm1 + D,
        *g_fc1 = g_norm1_b + D, *g_fc1_b = g_fc1 + square, *g_fc2 = g_fc1_b + D, *g_fc2_b = g_fc2 + square,
        *g_norm2 = g_fc2_b + D, *g_norm2_b = g_norm2 + D;
  for (int64_t i = 0; i < rows; ++i) {
    float* row = w.d + i * ld;
    norm_row_backward(row, row, t.normalised2 + i * ld, vectors[norm2_w], t.scale2[i], g_norm2, g_norm2_b, D);
  }
  add_outer(rows, D, D, w.d, ld, right(t.active), g_fc2, g_fc2_b, w);
  Products::multiply(rows, wide, left(w.d), matrices[fc2], w.a, ld);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = i * ld; c < i * ld + wide; c += W) store(w.a + c, load(w.a + c) * load(t.slope + c));
  }
  add_outer(rows, D, D, w.a, ld, right(t.hidden), g_fc1, g_fc1_b, w);
  Products::add_product(rows, wide, left(w.a), matrices[fc1], w.d, ld);
  for (int64_t i = 0; i < rows; ++i) {
    norm_row_backward(w.d + i * ld, w.b + i * ld, t.normalised1 + i * ld, vectors[norm1_w], t.scale1[i], g_norm1,
                      g_norm1_b, D);
    for (int64_t c = i * ld; r > 0 && p.net.sum && c < i * ld + wide; c += W) store(w.d + c, load(w.b + c));
  }
  add_outer(rows, D, D, w.b, ld, x, g_proj, g_proj_b, w);
  if (r == p.net.R - 1) Products::multiply(rows, wide, left(w.b), matrices[proj], w.d_x, ld);
  else Products::add_product(rows, wide, left(w.b), matrices[proj], w.d_x, ld);
}

template <class Products> void decode_by(const Decoder& net, float* images, float* kept) {
  const Packed<Products> p(net, false);
  const int64_t tokens = net.N * net.J, blocks = (tokens + kTokens - 1) / kTokens;
  const int64_t row = net.D * static_cast<int64_t>(sizeof(float));
  const int64_t bytes = tokens * net.L * static_cast<int64_t>(sizeof(float));
  const int64_t kept_bytes = kept ? kept_of(net, tokens) * static_cast<int64_t>(sizeof(float)) : 0;
  const bool stream = kept_bytes > kStreamBytes;
  if (stream) prefer_large_pages(kept, kept_bytes);
  if (bytes > kStreamBytes) prefer_large_pages(images, bytes);
  parallel_for(net.threads, blocks, 2, [&](int64_t begin, int64_t end) {
    const Workspace<Products> w(p, 1);
    const typename Products::Unit unit;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTokens, rows = first + kTokens < tokens ? kTokens : tokens - first;
      float* own = kept ? kept + kept_of(net, first) : nullptr;
      const Features x = features_of(p, first, rows, w);
      for (int64_t i = 0; own && !has_features(net) && i < rows; ++i, own += net.D) {
        write_out(own, x.at + i * x.ld, row, stream);
      }
      const auto x_left = Products::rows(w.x_left, x.at, x.ld, rows, net.D);
      const Features last = forward(p, rows, x, x_left, own, stream, w);
      const auto state = last.at == x.at ? x_left : Products::rows(w.left, last.at, last.ld, rows, net.D);
      Products::multiply(rows, whole(net.L), state, p.out_turned, w.tokens, p.ld_out, p.out_bias);
      move_tokens<true>(net, first, rows, w.tokens, p.ld_out, images);
    }
    finish_stream(stream);
  });
}

template <class Products>
void decode_backward_by(const Decoder& net, const float* d_images, const float* kept, float* d_inputs, bool learned,
                        float* const* d_weights, float* partial) {
  const Packed<Products> p(net, true);
  const Mhsc& codes = net.codes;
  const int64_t D = net.D, ld = p.ld, tokens = net.N * net.J, blocks = (tokens + kTokens - 1) / kTokens;
  const int64_t one = block_weights(net), count = all_weights(net), row = D * static_cast<int64_t>(sizeof(float));
  const int64_t width = has_features(net) ? D : codes.H * codes.K;
  const int64_t bytes = tokens * width * static_cast<int64_t>(sizeof(float));
  const bool stream = d_inputs && bytes > kStreamBytes;
  if (stream) prefer_large_pages(d_inputs, bytes);
  const int64_t parts = decoder_parts(net), wide = whole(D);
  parallel_for(net.threads, parts, 1, [&](int64_t begin, int64_t end) {
    const Workspace<Products> w(p, kept ? 1 : net.R);
    const typename Products::Unit unit;
    for (int64_t part = begin; part < end; ++part) {
      float *sums = partial + part * count, *last = sums + net.R * one, *saet = last + net.L * (D + 1);
      for (int64_t i = 0; i < count; ++i) sums[i] = 0;
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
        const int64_t first = block * kTokens, rows = first + kTokens < tokens ? kTokens : tokens - first;
        const float* known = kept ? kept + kept_of(net, first) : nullptr;
        const Features x = known && !has_features(net) ? Features{known, D} : features_of(p, first, rows, w);
        if (known && !has_features(net)) known += rows * D;
        const auto x_left = known ? typename Products::Left{} : Products::rows(w.x_left, x.at, x.ld, rows, D);
        const auto x_right = Products::right(w.x_right, x.at, x.ld, rows, D);
        Features state{w.state[0], ld};
        if (!known) state = forward(p, rows, x, x_left, nullptr, false, w);
        else if (net.R) known_state(p, net.R - 1, rows, known, w.state[0]);
        move_tokens<false>(net, first, rows, w.tokens, p.ld_out, const_cast<float*>(d_images));
        add_outer(rows, net.L, D, w.tokens, p.ld_out,
                  net.R ? Products::right(w.right, state.at, state.ld, rows, D) : x_right, last, last + net.L * D, w);
        float* d_x = net.R ? w.d_x : w.d;
        Products::multiply(rows, wide, Products::rows(w.left, w.tokens, p.ld_out, rows, net.L), p.out_plain, w.d, ld);
        for (int64_t r = net.R - 1; r >= 0; --r) {
          const Trace& trace = w.trace[known ? 0 : r];
          if (known) retrace_block(p, r, rows, known, trace, w);
          backward_block(p, r, rows, x_right, trace, w, sums + r * one);
        }
        for (int64_t i = 0; d_inputs && has_features(net) && i < rows; ++i) {
          write_out(d_inputs + (first + i) * D, d_x + i * ld, row, stream);
        }
        if (has_features(net) || !(d_inputs || learned)) continue;
        each_image(net, first, rows, [&](int64_t n, int64_t j, int64_t some, int64_t at) {
          for (int64_t h = 0, d = D / codes.H; h < codes.H; ++h) {
            p.pools.gradients(h, n, j, some, d_x + at * ld + h * d, ld, d_inputs,
                              learned ? saet + h * codes.K * d : nullptr, w.left, w.right, w.piece, stream);
          }
        });
      }
    }
    finish_stream(stream);
  });
  parallel_for(net.threads, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part) {  // a row at a time, which the compiler makes vectors of
      for (int64_t i = begin; i < end; ++i) partial[i] += partial[part * count + i];
    }
  });
  hand_out(net, partial, d_weights);
}

}  // namespace

void decode(const Decoder& net, float* images, float* kept) {
#ifdef SPEEDK_AMX
  if (by_unit(net)) return decode_by<MatrixUnit>(net, images, kept);
#endif
  decode_by<Vectors<float>>(net, images, kept);
}

void decode_backward(const Decoder& net, const float* d_images, const float* kept, float* d_inputs, bool learned,
                     float* const* d_weights, float* partial) {
#ifdef SPEEDK_AMX
  if (by_unit(net)) return decode_backward_by<MatrixUnit>(net, d_images, kept, d_inputs, learned, d_weights, partial);
#endif
  decode_backward_by<Vectors<float>>(net, d_images, kept, d_inputs, learned, d_weights, partial);
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
