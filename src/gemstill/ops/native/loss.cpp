// The elementwise half of the loss, fused: a row's sums, its loss and its gradient in passes that stay in the cache.
// Plain loops that compilers turn into AVX2, AVX-512 or NEON; threads are PyTorch's own.
//
// All tensors are contiguous unless a stride is an argument; T is float or bfloat16, sums are float. The Python
// side (ops/logits.py, ops/columns.py) allocates results and checks shapes.

#include "common.h"

namespace {

// A partial sum in float, of which a row's sum is made in double: so few that one large entry does not swallow many
// small ones, which over a vocabulary would make every log-sum-exp some 4e-7 too small.
constexpr int64_t lot = 256;

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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemstill, m) {
  m.def("cross_entropy(Tensor(a!) raw, Tensor ids, Tensor probs, Tensor rest, Tensor weight, Tensor(b!) loss, "
        "int inside, float softcap, float temperature, bool gradient) -> ()");
  m.def("divergence(Tensor(a!) raw, Tensor theirs, Tensor labels, Tensor weight, Tensor(b!) loss, int kind, "
        "float beta, float fraction, float softcap, float temperature, float their_softcap, "
        "float their_temperature, bool gradient) -> ()");
  m.def("column_squares(Tensor g, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gemstill, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("divergence", TORCH_BOX(&divergence));
  m.impl("column_squares", TORCH_BOX(&column_squares));
}
