// The elementwise halves of the network and of the loss, fused: one pass where a graph of tensor operations
// takes ten. Plain loops that compilers turn into AVX2, AVX-512 or NEON; threads are PyTorch's own.
//
// All tensors are contiguous unless a stride is an argument; T is float or bfloat16, sums are float. The Python
// side (ops/native.py, ops/fused.py) allocates results and checks shapes.

#include "common.h"

namespace {

// ---------------------------------------------------------------------------------------------------- loss

constexpr int64_t lot = 4096;  // a partial sum in float, of which a row's sum is made in double

template <class T, bool capped, bool bounded>
double row_top(const T* raw, int64_t V, const Cap& cap) {  // taken out where e^z may overflow
  float slope;
  return bounded ? 0.0 : double(value<capped, exact<T>>(largest(raw, V, -1e30f), cap, slope));
}

// The sum of e^(z - top) over [begin, end), and each times the cap's slope in `buffer`.
template <class T, bool capped, bool bounded>
double weigh(const T* raw, int64_t begin, int64_t end, const Cap& cap, float top, float* buffer) {
  double sum = 0;
  for (int64_t start = begin; start < end; start += lot) {
    const int64_t stop = std::min(end, start + lot);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t j = start; j < stop; j++) {
      float steep;
      const float e = power<bounded, exact<T>>(value<capped, exact<T>>(load(raw[j]), cap, steep) - top);
      part += e;
      buffer[j] = e * steep;
    }
    sum += part;
  }
  return sum;
}

// What a row learns from: entries with probabilities, and the mass of all others, which is `rest` where `inside`
// entries have their own.
struct Entries {
  const int64_t* ids;
  const float* probs;
  int64_t count, inside;
  float rest, weight;
};

template <class T, bool capped, bool bounded>
void cross_entropy_row(T* raw, const Entries& of, int64_t V, const Cap& cap, bool gradient, float* buffer,
                       float* loss) {
  constexpr bool precise = exact<T>;
  float slope;
  const double top = row_top<T, capped, bounded>(raw, V, cap);
  double total = 0, expected = 0;
  for (int64_t k = 0; k < of.count; k++) {
    total += double(of.probs[k]) * of.weight;
    expected += double(of.probs[k]) * of.weight * value<capped, true>(load(raw[of.ids[k]]), cap, slope);
  }
  // Entries with a share of their own cut the row, so that the sum of the others is not a difference.
  std::vector<int64_t> own;
  const double rest = double(of.rest) * of.weight;
  if (of.rest > 0) {
    for (int64_t k = 0; k < of.inside; k++) {
      if (of.probs[k] > 0) own.push_back(of.ids[k]);
    }
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
  }
  own.push_back(V);
  double others = 0, sum = 0;
  for (int64_t start = 0, i = 0; i < int64_t(own.size()); start = own[i++] + 1) {
    others += weigh<T, capped, bounded>(raw, start, own[i], cap, float(top), buffer);
    if (own[i] < V) sum += weigh<T, capped, bounded>(raw, own[i], own[i] + 1, cap, float(top), buffer);
  }
  sum += others;
  *loss = float(total * (std::log(sum) + top) - expected);
  if (of.rest > 0) *loss += float(rest * (std::log(sum) - std::log(others)));
  if (!gradient) return;
  double unit = (total + rest) / sum;
  if (of.rest > 0) {
    const float each = float(unit), other = float(unit - rest / others);
    for (int64_t start = 0, i = 0; i < int64_t(own.size()); start = own[i++] + 1) {
#pragma omp simd
      for (int64_t j = start; j < own[i]; j++) buffer[j] *= other;
      if (own[i] < V) buffer[own[i]] *= each;
    }
    unit = 1;
  }
  for (int64_t k = 0; k < of.count; k++) {
    const float taken = of.probs[k] * of.weight;
    if (taken == 0.0f) continue;
    value<capped, precise>(load(raw[of.ids[k]]), cap, slope);
    buffer[of.ids[k]] -= float(double(taken * slope) / unit);
  }
  const float factor = float(unit);
#pragma omp simd
  for (int64_t j = 0; j < V; j++) store(raw[j], buffer[j] * factor);
}

void check_ids(const Tensor& ids, int64_t V) {
  const int64_t* id = pointer<int64_t>(ids);
  for (int64_t i = 0; i < ids.numel(); i++) {
    STD_TORCH_CHECK(id[i] >= 0 && id[i] < V, "a target's id lies outside [0, V)");
  }
}

// raw [n, V] T: logits before the cap; becomes d loss / d raw where `gradient`. ids [n, K] int64, probs [n, K]
// float, weight [n] float. rest [n] float, or no elements: the mass of one bucket of all entries but the first
// `inside` slots'. loss [n] float: weight * (sum p * lse(z) - sum p z + rest * (lse(z) - lse(z of the others))).
void cross_entropy(Tensor raw, Tensor ids, Tensor probs, Tensor rest, Tensor weight, Tensor loss, int64_t inside,
                   double softcap, double temperature, bool gradient) {
  const int64_t n = raw.size(0), V = raw.size(1), K = ids.size(1);
  check_ids(ids, V);
  const Cap cap(softcap, temperature);
  const float* left = rest.numel() ? pointer<float>(rest) : nullptr;
  by_dtype(raw, [&](auto kind) {
    using T = decltype(kind);
    auto row = softcap <= 0     ? cross_entropy_row<T, false, false>
               : cap.bounded() ? cross_entropy_row<T, true, true>
                               : cross_entropy_row<T, true, false>;
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(V);
      for (int64_t i = begin; i < end; i++) {
        const Entries of{pointer<int64_t>(ids) + i * K, pointer<float>(probs) + i * K,     K, inside,
                         left ? left[i] : 0.0f,         pointer<float>(weight)[i]};
        row(pointer<T>(raw) + i * V, of, V, cap, gradient, buffer.data(), pointer<float>(loss) + i);
      }
    });
  });
}

// ln x for x > 0, normal: the exponent, and a series in (m - 1) / (m + 1) for the mantissa m in [1/sqrt 2, sqrt 2).
inline float logarithm(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x) - 0x3f3504f3;
  const float n = float(bits >> 23);
  const float m = __builtin_bit_cast(float, (bits & 0x7fffff) + 0x3f3504f3);
  const float r = (m - 1.0f) / (m + 1.0f), s = r * r;
  const float series = 2.0f + s * (0.66666667f + s * (0.4f + s * (0.28571429f + s * 0.22222222f)));
  return n * 0.69314718f + r * series;
}

struct Side {  // a row of the student or the teacher: z, e^(z - top), 1 / sum e^(z - top), ln sum e^z
  float *z, *weights;
  float inverse, lse;
};

template <class T, bool capped, bool bounded>
void read_row(const void* from, int64_t row, int64_t V, const Cap& cap, Side& side) {
  const T* raw = static_cast<const T*>(from) + row * V;
  const double top = row_top<T, capped, bounded>(raw, V, cap);
  float *z = side.z, *weights = side.weights;
  double sum = 0;
  for (int64_t start = 0; start < V; start += lot) {
    const int64_t stop = std::min(V, start + lot);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t j = start; j < stop; j++) {
      float steep;
      const float x = value<capped, exact<T>>(load(raw[j]), cap, steep);
      const float e = power<bounded, exact<T>>(x - float(top));
      z[j] = x;
      weights[j] = e;
      part += e;
    }
    sum += part;
  }
  side.inverse = float(1 / sum);
  side.lse = float(std::log(sum) + top);
}

using Reader = void (*)(const void*, int64_t, int64_t, const Cap&, Side&);

Reader reader_of(const Tensor& raw, const Cap& cap) {
  Reader reader = nullptr;
  by_dtype(raw, [&](auto kind) {
    using T = decltype(kind);
    reader = cap.cap <= 0    ? read_row<T, false, false>
             : cap.bounded() ? read_row<T, true, true>
                             : read_row<T, true, false>;
  });
  return reader;
}

enum : int64_t { cross_entropy_kind, reverse_kl_kind, jensen_shannon_kind };

// Of entry j: its share of the divergence, and what the gradient to z is q times, less the mean of that under q.
template <int64_t kind, bool precise>
inline void terms(const Side& mine, const Side& theirs, float beta, int64_t j, float& p, float& q, float& share,
                  float& ratio) {
  const float log_q = mine.z[j] - mine.lse;
  p = theirs.weights[j] * theirs.inverse;
  q = mine.weights[j] * mine.inverse;
  if constexpr (kind == cross_entropy_kind) {
    share = -p * log_q;
    ratio = 0.0f;
  } else if constexpr (kind == reverse_kl_kind) {
    ratio = log_q - (theirs.z[j] - theirs.lse);
    share = q * ratio;
  } else {  // ln q/m with m = beta p + (1 - beta) q
    const float d = within(theirs.z[j] - theirs.lse - log_q, -80.0f, 80.0f);
    ratio = -logarithm(1.0f - beta + beta * exponential<precise>(d));
    share = beta * p * (ratio + d) + (1.0f - beta) * q * ratio;
  }
}

struct Weights {  // of a row's divergence, and of its cross-entropy to a label (none where that is negative)
  float soft, hard;
  int64_t label;
};

// The loss of a row; its gradient to raw logits comes to be in mine.weights.
template <bool capped, int64_t kind, bool precise>
double divergence_row(const Side mine, const Side theirs, float beta, int64_t V, const Cap& cap, const Weights& by,
                      bool gradient) {
  double loss = 0, mean = 0;
  for (int64_t start = 0; start < V; start += lot) {
    const int64_t stop = std::min(V, start + lot);
    float part = 0.0f, average = 0.0f;
#pragma omp simd reduction(+ : part, average)
    for (int64_t j = start; j < stop; j++) {
      float p, q, share, ratio;
      terms<kind, precise>(mine, theirs, beta, j, p, q, share, ratio);
      part += share;
      average += q * ratio;
    }
    loss += part;
    mean += average;
  }
  loss *= by.soft;
  if (by.label >= 0) loss += double(by.hard) * (double(mine.lse) - mine.z[by.label]);
  if (!gradient) return loss;
  const float least = float(mean), inverse = capped ? 1.0f / cap.cap : 0.0f, hard = by.label >= 0 ? by.hard : 0.0f;
  const float soft = kind == jensen_shannon_kind ? by.soft * (1.0f - beta) : by.soft;
  const auto slope = [&](float z) {
    const float t = z * inverse;
    return capped ? cap.scale * (1.0f - t * t) : cap.scale;
  };
#pragma omp simd
  for (int64_t j = 0; j < V; j++) {
    float p, q, share, ratio;
    terms<kind, precise>(mine, theirs, beta, j, p, q, share, ratio);
    const float g = kind == cross_entropy_kind ? q - p : q * (ratio - least);
    mine.weights[j] = (soft * g + hard * q) * slope(mine.z[j]);
  }
  if (by.label >= 0) mine.weights[by.label] -= hard * slope(mine.z[by.label]);
  return loss;
}

template <int64_t kind, bool precise>
auto divergence_row_of(const Cap& cap) {
  return cap.cap > 0 ? divergence_row<true, kind, precise> : divergence_row<false, kind, precise>;
}

// raw, theirs [n, V] T each: logits before the cap of student and teacher; raw becomes d loss / d raw where
// `gradient`. labels [n] int64, or no elements. weight [n] float. loss [n] float: weight * ((1 - fraction) *
// divergence + fraction * cross-entropy to the label).
void divergence(Tensor raw, Tensor theirs, Tensor labels, Tensor weight, Tensor loss, int64_t kind, double beta,
                double fraction, double softcap, double temperature, double their_softcap, double their_temperature,
                bool gradient) {
  const int64_t n = raw.size(0), V = raw.size(1);
  check_ids(labels, V);
  const int64_t* label = labels.numel() ? pointer<int64_t>(labels) : nullptr;
  const Cap cap(softcap, temperature), their_cap(their_softcap, their_temperature);
  const Reader read = reader_of(raw, cap), their_read = reader_of(theirs, their_cap);
  by_dtype(raw, [&](auto dtype) {
    using T = decltype(dtype);
    const auto row = kind == cross_entropy_kind ? divergence_row_of<cross_entropy_kind, exact<T>>(cap)
                     : kind == reverse_kl_kind  ? divergence_row_of<reverse_kl_kind, exact<T>>(cap)
                                                : divergence_row_of<jensen_shannon_kind, exact<T>>(cap);
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> memory(4 * V);
      Side mine{&memory[0], &memory[V], 0.0f, 0.0f}, other{&memory[2 * V], &memory[3 * V], 0.0f, 0.0f};
      for (int64_t i = begin; i < end; i++) {
        read(raw.data_ptr(), i, V, cap, mine);
        their_read(theirs.data_ptr(), i, V, their_cap, other);
        const float each = pointer<float>(weight)[i];
        const Weights by{float(each * (1 - fraction)), float(each * fraction), label ? label[i] : -1};
        pointer<float>(loss)[i] = float(row(mine, other, float(beta), V, cap, by, gradient));
        if (!gradient) continue;
        T* to = pointer<T>(raw) + i * V;
#pragma omp simd
        for (int64_t j = 0; j < V; j++) store(to[j], mine.weights[j]);
      }
    });
  });
}

// g [n, V] T -> out [V] float: the sum of squares of each column.
void column_squares(Tensor g, Tensor out) {
  const int64_t n = g.size(0), V = g.size(1);
  constexpr int64_t columns = 2048;
  by_dtype(g, [&](auto kind) {
    using T = decltype(kind);
    torch::stable::parallel_for(0, (V + columns - 1) / columns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) {
        const int64_t first = c * columns, count = std::min(columns, V - first);
        float* to = pointer<float>(out) + first;
        std::fill(to, to + count, 0.0f);
        for (int64_t i = 0; i < n; i++) {
          const T* from = pointer<T>(g) + i * V + first;
#pragma omp simd
          for (int64_t j = 0; j < count; j++) to[j] += load(from[j]) * load(from[j]);
        }
      }
    });
  });
}

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

// joint [N, 2 I] T holds gate and up; out [N, I] T = gelu(gate) up, with the tanh form of gelu:
// gelu(x) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
template <bool precise>
inline float sigmoid_of(float x) {
  const float u = x * (-1.5957691216f - 0.0713548163f * x * x);
  return 1.0f / (1.0f + exponential<precise>(within(u, -87.0f, 88.0f)));
}

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
  m.def("cross_entropy(Tensor(a!) raw, Tensor ids, Tensor probs, Tensor rest, Tensor weight, Tensor(b!) loss, "
        "int inside, float softcap, float temperature, bool gradient) -> ()");
  m.def("divergence(Tensor(a!) raw, Tensor theirs, Tensor labels, Tensor weight, Tensor(b!) loss, int kind, "
        "float beta, float fraction, float softcap, float temperature, float their_softcap, "
        "float their_temperature, bool gradient) -> ()");
  m.def("column_squares(Tensor g, Tensor(a!) out) -> ()");
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
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("divergence", TORCH_BOX(&divergence));
  m.impl("column_squares", TORCH_BOX(&column_squares));
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
