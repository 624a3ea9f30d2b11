// The whole network for a few tokens; model/transformer.py tells what is computed and why. Activations are floats.

#pragma once

#include <initializer_list>

#include "step_attention.h"
#include "step_team.h"

namespace gemstill {

using torch::headeronly::ScalarType;

struct Gain {  // of an RMSNorm, less one: [size] float or bfloat16
  const void* data;
  bool wide;
};

struct Layer {
  Gain input, q_norm, k_norm, post_attention, pre_feedforward, post_feedforward;
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
  Matrix embedding, head;
  Gain norm;
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
void norm(const float* x, const Gain& gain, int64_t size, double eps, float* y) {
  if (gain.wide) {
    norm_of<float, adds>(x, static_cast<const float*>(gain.data), size, eps, y);
  } else {
    norm_of<bfloat16, adds>(x, static_cast<const bfloat16*>(gain.data), size, eps, y);
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
  void use(std::initializer_list<const Matrix*> matrices, int64_t n) {
    for (const Matrix* matrix : matrices) {
      vectors_[place(matrix->kind)].resize(matrix->kind, n, matrix->K);
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

struct Rows {  // the n tokens of a step: several of one slot follow one another
  int64_t n;
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
      attention_in_.use({&layer.q, &layer.k, &layer.v}, n);
      attention_out_.use({&layer.o}, n);
      feed_forward_in_.use({&layer.gate, &layer.up}, n);
      feed_forward_out_.use({&layer.down}, n);
    }
    head_in_.use({&N.head}, int64_t(rows.wanted.size()));
    int64_t parts = 0;
    for (int64_t m = 0; m < n; m++) {
      int64_t most = 0;
      for (const Layer& layer : N.layers) {
        const int64_t count = std::min(rows.positions[m] + 1, layer.window), size = part_of(count);
        most = std::max(most, (count + size - 1) / size);
      }
      parts += most;
    }
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

  // What a member of the team does that stands for `own` of the threads.
  void run(int64_t own) {
    begin(own);
    for (const Layer& layer : net_.layers) {
      project(own, layer);
      switch (net_.cache) {
        case ScalarType::Float: attend_to_all<float>(own, layer); break;
        case ScalarType::BFloat16: attend_to_all<bfloat16>(own, layer); break;
        default: attend_to_all<int8_t>(own, layer);
      }
      feed_forward(own, layer);
    }
    end(own);
  }

 private:
  template <class F>
  void each(int64_t own, int64_t count, const F& f) {
    team_.share(own, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i);
    });
  }

  // f(matrix, begin, end) for parts of the rows of all matrices, so large that handing them out costs little.
  template <class F>
  void each_rows(int64_t own, std::initializer_list<const Matrix*> matrices, const F& f) {
    const int64_t bytes[] = {4, 2, 1, 1, 1, 1, 1};
    int64_t panels = 0, least = 1;
    for (const Matrix* matrix : matrices) {
      panels += (matrix->N + PANEL - 1) / PANEL;
      least = std::max(least, PART / (PANEL * matrix->K * bytes[int(matrix->kind)]));
    }
    team_.share(own, panels, least, [&](int64_t begin, int64_t end) {
      for (const Matrix* matrix : matrices) {
        const int64_t count = (matrix->N + PANEL - 1) / PANEL, last = std::min(end, count);
        if (begin < last) f(*matrix, begin * PANEL, std::min(last * PANEL, matrix->N));
        begin = std::max<int64_t>(begin - count, 0);
        end -= count;
        if (end <= 0) return;
      }
    });
  }

  void begin(int64_t own);
  void project(int64_t own, const Layer& layer);
  template <class T>
  void attend_to_all(int64_t own, const Layer& layer);
  template <class T>
  void place_head(const Layer& layer, int64_t m, int64_t head);
  void feed_forward(int64_t own, const Layer& layer);
  void end(int64_t own);

  const Network& net_;
  const Rows& rows_;
  float* logits_;
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
