// The elementwise half of the network, fused: one pass where a graph of tensor operations takes ten. Plain loops
// that compilers turn into AVX2, AVX-512 or NEON; threads are PyTorch's own.
//
// All tensors are contiguous unless a stride is an argument; T is float or bfloat16, sums are float. The Python
// side (ops/fused.py, ops/attention.py) allocates results and checks shapes.

#include "common.h"

namespace {

// ----------------------------------------------------------------------------------------------- attention

constexpr int32_t lanes = 32;  // of the widest vector, in the narrowest dtype

// Exponentials of the scores [first, last) in place, less `top`, and zeros in the rest of [low, high), which the
// loop may run over in whole vectors; gives their sum.
template <class T, bool capped, bool bounded>
float exponentials(T* scores, int32_t low, int32_t first, int32_t last, int32_t high, const Cap& cap, float top,
                   T* steep) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int32_t j = low; j < high; j++) {
    float rise;
    const float e = power<bounded, exact<T>>(value<capped, exact<T>>(load(scores[j]), cap, rise) - top);
    const float kept = (j >= first) & (j < last) ? e : 0.0f;
    sum += kept;
    store(scores[j], kept);
    if constexpr (capped) store(steep[j], kept * rise);
  }
  return sum;
}

// Keys [first, last) that a query sees; [start, low) and [high, stop) are to be zeros.
struct Run {
  int32_t start, low, first, last, high, stop;
};

// The keys that a query sees lie together, but for a ring cache: one run of them after the other.
void find_runs(const bool* seen, int32_t count, std::vector<Run>& runs) {
  const auto next = [&](int32_t from, bool wanted) {
    const void* found = from < count ? std::memchr(seen + from, wanted, count - from) : nullptr;
    return found ? int32_t(static_cast<const bool*>(found) - seen) : count;
  };
  runs.clear();
  int32_t start = 0, first = next(0, true);
  do {
    const int32_t last = next(first, false), after = next(last, true);
    // Whole vectors reach over the ends of a run, but not into the next.
    const int32_t low = std::max(start, first / lanes * lanes);
    const int32_t high = after < count ? last : std::min(count, (last + lanes - 1) / lanes * lanes);
    const int32_t stop = after < count ? last : count;
    runs.push_back({start, low, first, last, high, stop});
    start = last;
    first = after;
  } while (first < count);
}

template <class T, bool capped, bool bounded>
float attention_row(T* scores, const std::vector<Run>& runs, const Cap& cap, T* steep) {
  float top = 0.0f, slope;
  if constexpr (!bounded) {
    top = -1e30f;
    for (const Run& run : runs) top = largest(scores + run.first, run.last - run.first, top);
    top = value<capped, exact<T>>(top, cap, slope);
  }
  float sum = 0.0f;
  for (const Run& run : runs) {
    for (T* part : {scores, steep}) {
      std::memset(part + run.start, 0, (run.low - run.start) * sizeof(T));
      std::memset(part + run.high, 0, (run.stop - run.high) * sizeof(T));
    }
    sum += exponentials<T, capped, bounded>(scores, run.low, run.first, run.last, run.high, cap, top, steep);
  }
  return std::max(sum, 1e-37f);  // a row that sees nothing stays 0 instead of NaN
}

// A tile of queries: what is of shape [A, Tq, R, ..] counts A over [batch, groups, bands] and lies at token
// bands * band + start + q of a tensor [batch, T, groups, R, ..]. Tokens past T are padding.
struct Tile {
  int64_t Tq, R, T, groups, bands, band, start;

  int64_t mask_row(int64_t query) const {  // query counts [A, Tq]
    const int64_t q = query % Tq, a = query / Tq;
    return (a / (groups * bands) * bands + a % bands) * Tq + q;
  }
  int64_t place(int64_t i) const {  // in rows of the tensor [batch, T, groups, R]; -1 for padding
    const int64_t r = i % R, q = i / R % Tq, a = i / (R * Tq);
    const int64_t token = a % bands * band + start + q, g = a / bands % groups, b = a / (bands * groups);
    return token < T ? ((b * T + token) * groups + g) * R + r : -1;
  }
};

// scores [A, Tq, R, Tk] T become exp(cap(scores)), up to a factor for each row, 0 where not seen; sums
// [A, Tq, R] float. steep, of the same shape: the exponentials times the slope of the cap; without a cap unused.
// seen [M, Tq, Tk] bool with M counting [batch, bands].
void attention_exponentials(Tensor scores, Tensor seen, Tensor sums, Tensor steep, int64_t groups, int64_t bands,
                            double softcap) {
  const int64_t Tq = scores.size(1), R = scores.size(2), Tk = scores.size(3);
  const bool* mask = pointer<bool>(seen);
  const Tile tile{Tq, R, 0, groups, bands, 0, 0};
  const Cap cap(softcap);
  by_dtype(scores, [&](auto kind) {
    using T = decltype(kind);
    auto run = softcap <= 0    ? attention_row<T, false, false>
               : softcap <= 60 ? attention_row<T, true, true>
                               : attention_row<T, true, false>;
    over(scores.size(0) * Tq, 4 * R * Tk, [&](int64_t begin, int64_t end) {
      std::vector<Run> runs;
      for (int64_t query = begin; query < end; query++) {
        find_runs(mask + tile.mask_row(query) * Tk, int32_t(Tk), runs);
        for (int64_t i = query * R; i < (query + 1) * R; i++) {
          T* row = pointer<T>(scores) + i * Tk;
          T* rise = softcap > 0 ? pointer<T>(steep) + i * Tk : row;
          pointer<float>(sums)[i] = run(row, runs, cap, rise);
        }
      }
    });
  });
}

// part [A, Tq, R, D] T divided by sums [A, Tq, R] float goes to its place in out [batch, T, groups, R, D].
void attention_place(Tensor part, Tensor sums, Tensor out, int64_t bands, int64_t band, int64_t start) {
  const int64_t D = part.size(3);
  const Tile tile{part.size(1), part.size(2), out.size(1), out.size(2), bands, band, start};
  by_dtype(out, [&](auto kind) {
    using T = decltype(kind);
    over(part.numel() / D, D, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t place = tile.place(i);
        if (place < 0) continue;
        const T* from = pointer<T>(part) + i * D;
        T* to = pointer<T>(out) + place * D;
        const float by = 1.0f / pointer<float>(sums)[i];
#pragma omp simd
        for (int64_t j = 0; j < D; j++) store(to[j], load(from[j]) * by);
      }
    });
  });
}

// The way back: part = grad / sums from its place in grad, and delta [A, Tq, R] float, the product of part and out.
void attention_take(Tensor grad, Tensor out, Tensor sums, Tensor part, Tensor delta, int64_t bands, int64_t band,
                    int64_t start) {
  const int64_t D = part.size(3);
  const Tile tile{part.size(1), part.size(2), out.size(1), out.size(2), bands, band, start};
  by_dtype(out, [&](auto kind) {
    using T = decltype(kind);
    over(part.numel() / D, D, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t place = tile.place(i);
        T* to = pointer<T>(part) + i * D;
        pointer<float>(delta)[i] = 0.0f;
        if (place < 0) {
          std::fill(to, to + D, T{});
          continue;
        }
        const T* g = pointer<T>(grad) + place * D;
        const T* o = pointer<T>(out) + place * D;
        const float by = 1.0f / pointer<float>(sums)[i];
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < D; j++) {
          const float x = load(g[j]) * by;
          sum += x * load(o[j]);
          store(to[j], x);
        }
        pointer<float>(delta)[i] = sum;
      }
    });
  });
}

// products [rows, Tk] T: gradients of the weights; become gradients of the scores, steep * (products - delta).
void attention_gradient(Tensor products, Tensor steep, Tensor delta) {
  const int64_t Tk = products.size(-1), rows = products.numel() / Tk;
  by_dtype(products, [&](auto kind) {
    using T = decltype(kind);
    over(rows, Tk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        T* p = pointer<T>(products) + i * Tk;
        const T* s = pointer<T>(steep) + i * Tk;
        const float d = pointer<float>(delta)[i];
#pragma omp simd
        for (int64_t j = 0; j < Tk; j++) store(p[j], load(s[j]) * (load(p[j]) - d));
      }
    });
  });
}

// -------------------------------------------------------------------------------------------------- rotary

// One pass from the joint projection to what attention multiplies, or back: a token's heads.
template <class T, bool back>
void heads_row(T* joint, const float* cos, const float* sin, T* q, T* k, T* v, int64_t G, int64_t R, int64_t d,
               int64_t tokens, float scale) {
  const int64_t half = d / 2, H = G * R;
  for (int64_t h = 0; h < H + G; h++) {
    T* flat = joint + h * d;
    T* head = h < H ? q + (h / R * tokens * R + h % R) * d : k + (h - H) * tokens * d;
    const float by = h < H ? scale : 1.0f;
    T* from = back ? head : flat;
    T* to = back ? flat : head;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
      const float a = load(from[j]) * by, b = load(from[j + half]) * by;
      const float c = cos[j], s = back ? -sin[j] : sin[j];
      store(to[j], a * c - b * s);
      store(to[j + half], b * c + a * s);
    }
  }
  for (int64_t g = 0; g < G; g++) {
    T* flat = joint + (H + G + g) * d;
    T* head = v + g * tokens * d;
    std::copy(back ? head : flat, (back ? head : flat) + d, back ? flat : head);
  }
}

// joint [B, T, (G R + 2 G) d] T; cos, sin [Bc, T, d/2] float with Bc = B or 1; q [B, G, T, R, d], rotated and
// scaled, k [B, G, T, d], rotated, v [B, G, T, d].
void heads(Tensor joint, Tensor cos, Tensor sin, Tensor q, Tensor k, Tensor v, double scale, bool back) {
  const int64_t B = q.size(0), G = q.size(1), tokens = q.size(2), R = q.size(3), d = q.size(4);
  const int64_t shared = cos.size(0) == 1 ? 0 : 1, width = (G * R + 2 * G) * d;
  by_dtype(joint, [&](auto kind) {
    using T = decltype(kind);
    over(B * tokens, width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / tokens, t = i % tokens, angle = (b * shared * tokens + t) * (d / 2);
        const int64_t row = b * G * tokens + t;
        auto run = back ? heads_row<T, true> : heads_row<T, false>;
        run(pointer<T>(joint) + i * width, pointer<float>(cos) + angle, pointer<float>(sin) + angle,
            pointer<T>(q) + row * R * d, pointer<T>(k) + row * d, pointer<T>(v) + row * d, G, R, d, tokens,
            float(scale));
      }
    });
  });
}

// --------------------------------------------------------------------------------------------------- GeGLU

// joint [N, 2 I] T holds gate and up; out [N, I] T = gelu(gate) up, gelu(x) = x sigmoid_of(x).
void geglu(Tensor joint, Tensor out) {
  const int64_t I = out.size(-1), N = out.numel() / I;
  by_dtype(out, [&](auto kind) {
    using T = decltype(kind);
    over(N, 2 * I, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* gate = pointer<T>(joint) + 2 * i * I;
        const T* up = gate + I;
        T* to = pointer<T>(out) + i * I;
#pragma omp simd
        for (int64_t j = 0; j < I; j++) {
          const float x = load(gate[j]);
          store(to[j], x * sigmoid_of<exact<T>>(x) * load(up[j]));
        }
      }
    });
  });
}

// grad [N, I] T of the result; joint_grad [N, 2 I] T.
void geglu_backward(Tensor grad, Tensor joint, Tensor joint_grad) {
  const int64_t I = grad.size(-1), N = grad.numel() / I;
  by_dtype(grad, [&](auto kind) {
    using T = decltype(kind);
    over(N, 4 * I, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* gate = pointer<T>(joint) + 2 * i * I;
        const T* up = gate + I;
        const T* g = pointer<T>(grad) + i * I;
        T* to = pointer<T>(joint_grad) + 2 * i * I;
#pragma omp simd
        for (int64_t j = 0; j < I; j++) {
          const float x = load(gate[j]), s = sigmoid_of<exact<T>>(x), y = load(g[j]);
          const float slope = s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
          store(to[j], y * load(up[j]) * slope);
          store(to[I + j], y * x * s);
        }
      }
    });
  });
}

// ------------------------------------------------------------------------------------------------ RMSNorm

// x [N, D] T, gain [D] float (1 + weight), out [N, D] T = residual + x / sqrt(mean(x^2) + eps) * gain; the
// residual is left out where it has no elements. inverse [N] float: 1 / sqrt(mean(x^2) + eps).
void rms_norm(Tensor x, Tensor gain, Tensor residual, Tensor out, Tensor inverse, double eps) {
  const int64_t D = x.size(-1), N = x.numel() / D;
  const bool adds = residual.numel() > 0;
  by_dtype(x, [&](auto kind) {
    using T = decltype(kind);
    over(N, D, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* from = pointer<T>(x) + i * D;
        const float* by = pointer<float>(gain);
        T* to = pointer<T>(out) + i * D;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < D; j++) sum += load(from[j]) * load(from[j]);
        const float r = 1.0f / std::sqrt(sum / float(D) + float(eps));
        pointer<float>(inverse)[i] = r;
        if (adds) {
          const T* rest = pointer<T>(residual) + i * D;
#pragma omp simd
          for (int64_t j = 0; j < D; j++) {
            T rounded;  // the sum is taken of rounded values, as a network of separate layers takes it
            store(rounded, load(from[j]) * r * by[j]);
            store(to[j], load(rest[j]) + load(rounded));
          }
        } else {
#pragma omp simd
          for (int64_t j = 0; j < D; j++) store(to[j], load(from[j]) * r * by[j]);
        }
      }
    });
  });
}

// grad [N, D] T of the result -> x_grad [N, D] T, gain_grad [D] float.
void rms_norm_backward(Tensor grad, Tensor x, Tensor gain, Tensor inverse, Tensor x_grad, Tensor gain_grad) {
  const int64_t D = x.size(-1), N = x.numel() / D;
  constexpr int64_t lot = 64;  // rows of a partial sum: fixed, so that the sum's order is
  const int64_t lots = (N + lot - 1) / lot;
  std::vector<float> partial(lots * D, 0.0f);
  by_dtype(x, [&](auto kind) {
    using T = decltype(kind);
    torch::stable::parallel_for(0, lots, std::max<int64_t>(1, 16384 / (lot * D)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * lot; i < std::min(N, end * lot); i++) {
        const T* g = pointer<T>(grad) + i * D;
        const T* from = pointer<T>(x) + i * D;
        const float* by = pointer<float>(gain);
        T* to = pointer<T>(x_grad) + i * D;
        float* gains = partial.data() + i / lot * D;
        const float r = pointer<float>(inverse)[i];
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < D; j++) along += load(g[j]) * by[j] * load(from[j]);
        const float back = along * r * r / float(D);
#pragma omp simd
        for (int64_t j = 0; j < D; j++) {
          const float y = load(g[j]), v = load(from[j]);
          gains[j] += y * v * r;
          store(to[j], r * (y * by[j] - v * back));
        }
      }
    });
  });
  float* sum = pointer<float>(gain_grad);
  std::fill(sum, sum + D, 0.0f);
  for (int64_t l = 0; l < lots; l++) {
    for (int64_t j = 0; j < D; j++) sum[j] += partial[l * D + j];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(gemstill, m) {
  m.def("attention_exponentials(Tensor(a!) scores, Tensor seen, Tensor(b!) sums, Tensor(c!) steep, int groups, "
        "int bands, float softcap) -> ()");
  m.def("attention_place(Tensor part, Tensor sums, Tensor(a!) out, int bands, int band, int start) -> ()");
  m.def("attention_take(Tensor grad, Tensor out, Tensor sums, Tensor(a!) part, Tensor(b!) delta, int bands, "
        "int band, int start) -> ()");
  m.def("attention_gradient(Tensor(a!) products, Tensor steep, Tensor delta) -> ()");
  m.def("heads(Tensor(a!) joint, Tensor cos, Tensor sin, Tensor(b!) q, Tensor(c!) k, Tensor(d!) v, float scale, "
        "bool back) -> ()");
  m.def("geglu(Tensor joint, Tensor(a!) out) -> ()");
  m.def("geglu_backward(Tensor grad, Tensor joint, Tensor(a!) joint_grad) -> ()");
  m.def("rms_norm(Tensor x, Tensor gain, Tensor residual, Tensor(a!) out, Tensor(b!) inverse, float eps) -> ()");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor gain, Tensor inverse, Tensor(a!) x_grad, "
        "Tensor(b!) gain_grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gemstill, CPU, m) {
  m.impl("attention_exponentials", TORCH_BOX(&attention_exponentials));
  m.impl("attention_place", TORCH_BOX(&attention_place));
  m.impl("attention_take", TORCH_BOX(&attention_take));
  m.impl("attention_gradient", TORCH_BOX(&attention_gradient));
  m.impl("heads", TORCH_BOX(&heads));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
