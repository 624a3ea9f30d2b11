// The whole network for a few tokens; model/transformer.py tells what is computed and why. Activations are floats.

#pragma once

#include <initializer_list>
#include <vector>

#include "step_attention.h"
#include "step_team.h"

namespace gemstill {

using torch::headeronly::ScalarType;

struct Layer {
  // Gains of RMSNorms, less one: [1, size] float or bfloat16.
  Matrix input, q_norm, k_norm, post_attention, pre_feedforward, post_feedforward;
  Matrix q, k, v, o, gate, up, down;
  void *keys, *values;                // [slots, G, size, d]
  float *key_scales, *value_scales;  // [slots, G, size, blocks of d], of int8
  int64_t size, window;
  bool local;
};

struct Network {
  int64_t D, I, H, G, d, V;
  bool qk_norm;
  ScalarType cache;  // Float, BFloat16 or Char
  double eps, embedding_scale, query_scale, softcap, final_softcap;
  const float* frequencies;  // [2, d / 2]: of global layers, of local ones
  Matrix embedding, head, norm;
  std::vector<Layer> layers;
};

// y [size] = x / sqrt(mean(x^2) + eps) (1 + gain), + y where `adds`. x and y may be the same.
template <class T, bool adds>
void norm_of(const float* x, const T* gain, int64_t size, double eps, float* y) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < size; j++) sum += x[j] * x[j];
  const float r = 1.0f / std::sqrt(sum / float(size) + float(eps));
#pragma omp simd
  for (int64_t j = 0; j < size; j++) y[j] = (adds ? y[j] : 0.0f) + x[j] * r * (1.0f + load(gain[j]));
}

template <bool adds>
void norm(const float* x, const Matrix& gain, int64_t size, double eps, float* y) {
  if (gain.kind == Kind::float32) {
    norm_of<float, adds>(x, reinterpret_cast<const float*>(gain.data), size, eps, y);
  } else {
    norm_of<bfloat16, adds>(x, reinterpret_cast<const bfloat16*>(gain.data), size, eps, y);
  }
}

inline void row_of(const Matrix& matrix, int64_t row, float* to) {
  const auto copy = [&](auto* from) {
    for (int64_t k = 0; k < matrix.K; k++) to[k] = load(from[row * matrix.K + k]);
  };
  if (matrix.kind == Kind::float32) return copy(reinterpret_cast<const float*>(matrix.data));
  if (matrix.kind == Kind::bfloat16) return copy(reinterpret_cast<const bfloat16*>(matrix.data));
  unpack_rows(matrix, row, row + 1, to);
}

// Vectors [n, K] as products with all kinds of matrices that there are take them.
class Inputs {
 public:
  // Those from `exact` on may be rounded.
  void use(std::initializer_list<const Matrix*> matrices, int64_t n, int64_t exact) {
    for (const Matrix* matrix : matrices) {
      vectors_[place(matrix->kind)].resize(matrix->kind, n, matrix->K, exact);
      used_[place(matrix->kind)] = true;
    }
  }
  // Vector m, which begins at x + m K.
  void take(const float* x, int64_t m) {
    for (int at = 0; at < 3; at++) {
      if (used_[at]) vectors_[at].take(x, m, m + 1);
    }
  }
  const Activations& operator()(const Matrix& matrix) const { return vectors_[place(matrix.kind)]; }

 private:
  static int place(Kind kind) { return std::min(int(kind), 2); }
  Activations vectors_[3];
  bool used_[3] = {};
};

constexpr int64_t PART = 1 << 16;  // bytes of weights that a thread takes at least
constexpr int64_t MEANWHILE = 1 << 18;  // bytes that it asks for at most while it waits for others

struct Rows {  // the n tokens of a step: several of one slot follow one another
  int64_t n, exact;  // the first ones are multiplied as floats, whatever weights are
  const int64_t *tokens, *slots, *positions;
  std::vector<int64_t> wanted;  // those whose logits are asked for
};

class Step {
 public:
  // logits: [wanted, V].
  Step(const Network& network, const Rows& rows, float* logits, int64_t threads)
      : net_(network), rows_(rows), logits_(logits), team_(threads) {
    const Network& N = net_;
    const int64_t n = rows.n;
    for (const Layer& layer : N.layers) {
      attention_in_.use({&layer.q, &layer.k, &layer.v}, n, rows.exact);
      attention_out_.use({&layer.o}, n, rows.exact);
      feed_forward_in_.use({&layer.gate, &layer.up}, n, rows.exact);
      feed_forward_out_.use({&layer.down}, n, rows.exact);
    }
    const int64_t wanted = int64_t(rows.wanted.size());
    head_in_.use({&N.head}, wanted, wanted);
    for (const Layer& layer : N.layers) {
      if (plans_[layer.local].firsts.empty()) plans_[layer.local] = plan(rows, layer.window);
    }
    const int64_t parts = std::max(plans_[0].parts.size(), plans_[1].parts.size());
    x_.resize(n * N.D);
    normed_.resize(n * N.D);
    out_.resize(n * N.D);
    joint_.resize(n * (N.H + 2 * N.G) * N.d);
    queries_.resize(n * N.H * N.d);
    attended_.resize(n * N.H * N.d);
    gate_.resize(n * N.I);
    hidden_.resize(n * N.I);
    turns_.resize(n * 2 * N.d);
    partials_.resize(parts * N.H);
    parts_.resize(parts * N.H * N.d);
  }

  // What a member of the team does.
  void run(const Member& me) {
    begin(me);
    for (size_t i = 0; i < net_.layers.size(); i++) {
      switch (net_.cache) {
        case ScalarType::Float: look<float>(me, net_.layers[i]); break;
        case ScalarType::BFloat16: look<bfloat16>(me, net_.layers[i]); break;
        default: look<int8_t>(me, net_.layers[i]);
      }
      feed_forward(me, i);
    }
    end(me);
  }

 private:
  struct Part {  // of what token m sees: keys at positions [start, start + count)
    int64_t m, start, count;
  };
  struct Plan {
    std::vector<Part> parts;
    std::vector<int64_t> firsts;  // the number of each token's first part, and of all
  };
  static Plan plan(const Rows& rows, int64_t window) {
    Plan made{{}, {0}};
    for (int64_t m = 0; m < rows.n; m++) {
      const int64_t end = rows.positions[m] + 1, seen = std::min(end, window), size = part_of(seen);
      for (int64_t at = end - seen; at < end; at += size) made.parts.push_back({m, at, std::min(size, end - at)});
      made.firsts.push_back(int64_t(made.parts.size()));
    }
    return made;
  }

  using Matrices = std::vector<const Matrix*>;
  static int64_t panels_of(const Matrix& matrix) { return (matrix.N + PANEL - 1) / PANEL; }

  template <class F>
  void each(const Member& me, int64_t count, const F& f) {
    team_.share(
        me, count, 1, [&](int64_t begin, int64_t end, int64_t) { for (int64_t i = begin; i < end; i++) f(i); }, [] {});
  }

  // f(begin, end, stop) for parts of [0, count), then after(m) for every token: of one alone in the member that was
  // last, since the others would only wait for it. later: what this member reads next.
  template <class F, class G>
  void each_part(const Member& me, int64_t count, int64_t least, const void* later, const F& f, const G& after) {
    const Stretch next{static_cast<const uint8_t*>(later), later ? MEANWHILE : 0};
    team_.share(me, count, least, f, [&] { if (rows_.n == 1) after(0); }, next);
    if (rows_.n > 1) each(me, rows_.n, after);
  }

  // f(matrix, begin, end, ahead) for parts of the rows of all matrices, so large that handing them out costs little;
  // then after(m) for every token.
  template <class F, class G>
  void each_rows(const Member& me, const Matrices& matrices, const uint8_t* later, const F& f, const G& after) {
    const int64_t bytes[] = {4, 2, 1, 1, 1, 1, 1};
    int64_t panels = 0, least = 1;
    for (const Matrix* matrix : matrices) {
      panels += panels_of(*matrix);
      least = std::max(least, PART / (PANEL * matrix->K * bytes[int(matrix->kind)]));
    }
    each_part(me, panels, least, later, [&](int64_t begin, int64_t end, int64_t stop) {
      for (size_t i = 0; i < matrices.size() && end > 0; i++) {
        const Matrix& matrix = *matrices[i];
        const int64_t count = panels_of(matrix), last = std::min(end, count);
        const bool more = stop > count && i + 1 < matrices.size();
        const Ahead ahead{std::min(stop, count) * PANEL, more ? weights_from(*matrices[i + 1], 0) : later};
        if (begin < last) f(matrix, begin * PANEL, std::min(last * PANEL, matrix.N), ahead);
        begin = std::max<int64_t>(begin - count, 0);
        end -= count;
        stop -= count;
      }
    }, after);
  }

  // Where the keys, or values, lie that part `i / G` of a layer looks at, for one of G groups of heads.
  template <class T>
  Ring<T> ring_of(const Layer& layer, int64_t i, bool values) const {
    const int64_t m = plans_[layer.local].parts[i / net_.G].m;
    const int64_t from = (rows_.slots[m] * net_.G + i % net_.G) * layer.size;
    return {static_cast<const T*>(values ? layer.values : layer.keys) + from * net_.d,
            scales_at<T>(values ? layer.value_scales : layer.key_scales, from * blocks_of(net_.d)), layer.size, net_.d};
  }
  template <class T>
  const T* first_key(const Layer& layer, int64_t i) const {
    const Ring<T> keys = ring_of<T>(layer, i, false);
    return keys.from(plans_[layer.local].parts[i / net_.G].start % keys.size).data;
  }

  // Where a member begins to read these matrices.
  const uint8_t* first_of(const Member& me, const Matrices& matrices) const {
    int64_t panels = 0;
    for (const Matrix* matrix : matrices) panels += panels_of(*matrix);
    int64_t at = team_.first_of(me.first, panels);
    for (const Matrix* matrix : matrices) {
      if (at < panels_of(*matrix)) return weights_from(*matrix, at * PANEL);
      at -= panels_of(*matrix);
    }
    return nullptr;
  }

  void begin(const Member& me);
  void enter(const Layer& layer, int64_t m);
  template <class T>  // the cache's
  void look(const Member& me, const Layer& layer) {
    project<T>(me, layer);
    attend_to_all<T>(me, layer);
  }
  template <class T>
  void project(const Member& me, const Layer& layer);
  template <class T>
  void attend_to_all(const Member& me, const Layer& layer);
  template <class T>
  void place_head(const Layer& layer, int64_t m, int64_t head);
  void feed_forward(const Member& me, size_t number);
  void end(const Member& me);

  const Network& net_;
  const Rows& rows_;
  float* logits_;
  Plan plans_[2];  // of global and of local layers
  Team team_;
  Inputs attention_in_, attention_out_, feed_forward_in_, feed_forward_out_, head_in_;
  std::vector<float> x_, normed_, out_;           // [n, D]
  std::vector<float> joint_;                      // [n, H + 2 G, d]: queries, keys, values
  std::vector<float> queries_, attended_;         // [n, H, d]
  std::vector<float> gate_, hidden_;              // [n, I]
  std::vector<float> turns_;                      // [n, 2, d]: cosines and sines of global and of local layers
  std::vector<Partial> partials_;                 // [parts, H]; a token's parts lie together
  std::vector<float> parts_;                      // [parts, H, d]
};

}  // namespace gemstill
