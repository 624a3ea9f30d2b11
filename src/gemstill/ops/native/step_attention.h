// Attention of one query position over a part of what it sees, and the parts put together.

#pragma once

#include "common.h"
#include "packed_rows.h"

namespace gemstill {

constexpr int64_t SPLIT = 256;  // keys of a part at most
constexpr int64_t STEP = 2 * LANES;
constexpr int HEADS = 4;  // that read a key together
// Keys that are read together, from places far apart: memory answers two streams faster than one.
constexpr int STREAMS = 2;

// Keys of a part, where `count` are seen: a few parts at least, so that all threads have some.
inline int64_t part_of(int64_t count) {
  return std::min<int64_t>(SPLIT, std::max<int64_t>(32, (count / 8 + 15) / 16 * 16));
}

template <class T>
constexpr bool has_scales = std::is_same_v<T, int8_t>;
inline int64_t blocks_of(int64_t d) { return (d + BLOCK - 1) / BLOCK; }
template <class T>
float* scales_at(float* scales, int64_t at) {
  return has_scales<T> ? scales + at : nullptr;
}

inline const uint16_t* raw(const bfloat16* x) { return reinterpret_cast<const uint16_t*>(x); }
inline const float* raw(const float* x) { return x; }
inline const int8_t* raw(const int8_t* x) { return x; }

#ifdef __AVX512F__
inline Floats floats_at(const int8_t* from) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
#elif defined(__AVX2__)
inline Floats floats_at(const int8_t* from) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
#else
inline Floats floats_at(const int8_t* from) {
  Floats x;
  for (int i = 0; i < LANES; i++) x[i] = float(from[i]);
  return x;
}
#endif
inline void weights_at(const int8_t* from, Floats& a, Floats& b) {
  a = floats_at(from);
  b = floats_at(from + LANES);
}

// Where the keys or values of one text and one group of heads lie: [size, d] of T, position p at p % size; of int8
// there is a scale for each BLOCK of d.
template <class T>
struct Ring {
  const T* data;
  const float* scales;
  int64_t size, d;

  Ring from(int64_t index) const {
    return {data + index * d, has_scales<T> ? scales + index * blocks_of(d) : nullptr, size, d};
  }
  // 2 LANES numbers from k on, and one of them.
  void numbers_at(int64_t index, int64_t k, Floats& a, Floats& b) const {
    weights_at(raw(data + index * d + k), a, b);
    if constexpr (has_scales<T>) {
      const float scale = scales[index * blocks_of(d) + k / BLOCK];
      a *= scale;
      b *= scale;
    }
  }
  float number_at(int64_t index, int64_t k) const {
    const float x = load(data[index * d + k]);
    if constexpr (has_scales<T>) return x * scales[index * blocks_of(d) + k / BLOCK];
    return x;
  }
};

// A part's result for one head: out [d] = sum of e^(score - top) value, and the sum of e^(score - top).
struct Partial {
  float top, sum;
};

// Numbers [d] in the order in which keys and values of T are multiplied, and back: in whole steps of bfloat16, those at
// even places first.
template <class T>
void order(const float* x, int64_t d, float* to) {
  int64_t k = 0;
  if constexpr (sizeof(T) == 2) {
    for (; k + STEP <= d; k += STEP) {
      for (int i = 0; i < LANES; i++) {
        to[k + i] = x[k + 2 * i];
        to[k + LANES + i] = x[k + 2 * i + 1];
      }
    }
  }
  std::copy(x + k, x + d, to + k);
}
template <class T>
void order_back(const float* x, int64_t d, float* to) {
  int64_t k = 0;
  if constexpr (sizeof(T) == 2) {
    for (; k + STEP <= d; k += STEP) {
      for (int i = 0; i < LANES; i++) {
        to[k + 2 * i] = x[k + i];
        to[k + 2 * i + 1] = x[k + LANES + i];
      }
    }
  }
  std::copy(x + k, x + d, to + k);
}

// What is read after all of a part's keys, or values, and what is some rows behind those at `now`: the former may not
// have come so far.
template <class T>
void ask(const T* later, const T* now) {
  __builtin_prefetch(later, 0, 3);
  __builtin_prefetch(now + AHEAD / sizeof(T), 0, 3);
}

// scores[r * SPLIT + j * apart] = query r times key j of J, `apart` from one another. ahead: the first of as many numbers
// that are read later, and asked for.
template <class T, int R, int J>
void scores_of(const float* queries, const Ring<T>& keys, int64_t apart, const T* ahead, float* scores) {
  const int64_t d = keys.d;
  Floats sum[R][J];
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < J; j++) sum[r][j] = Floats{};
  }
  const int64_t whole = d / STEP * STEP;
  for (int64_t k = 0; k < whole; k += STEP) {
    Floats a[J], b[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) {
      ask(ahead + j * apart * d + k, keys.data + j * apart * d + k);
      keys.numbers_at(j * apart, k, a[j], b[j]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Floats even = vector_at<Floats>(queries + r * d + k), odd = vector_at<Floats>(queries + r * d + k + LANES);
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        sum[r][j] += even * a[j];
        sum[r][j] += odd * b[j];
      }
    }
  }
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < J; j++) {
      float rest = total(sum[r][j]);
      for (int64_t k = whole; k < d; k++) rest += queries[r * d + k] * keys.number_at(j * apart, k);
      scores[r * SPLIT + j * apart] = rest;
    }
  }
}

// out[r, :] += the sum over j < J, i < count of weights[r * SPLIT + j * apart + i] times value j * apart + i.
template <class T, int R, int J>
void add_values(const float* weights, const Ring<T>& values, int64_t apart, int64_t count, const T* ahead, float* out) {
  const int64_t d = values.d;
  const int64_t whole = d / STEP * STEP;
  for (int64_t k = 0; k < whole; k += STEP) {
    Floats even[R], odd[R];
    for (int r = 0; r < R; r++) {
      even[r] = vector_at<Floats>(out + r * d + k);
      odd[r] = vector_at<Floats>(out + r * d + k + LANES);
    }
    for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        ask(ahead + (j * apart + i) * d + k, values.data + (j * apart + i) * d + k);
        Floats a, b;
        values.numbers_at(j * apart + i, k, a, b);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const float w = weights[r * SPLIT + j * apart + i];
          even[r] += w * a;
          odd[r] += w * b;
        }
      }
    }
    for (int r = 0; r < R; r++) {
      std::memcpy(out + r * d + k, &even[r], sizeof(Floats));
      std::memcpy(out + r * d + k + LANES, &odd[r], sizeof(Floats));
    }
  }
  for (int r = 0; r < R; r++) {
    for (int64_t j = 0; j < J * count; j++) {
      const int64_t at = j / count * apart + j % count;
      for (int64_t k = whole; k < d; k++) out[r * d + k] += weights[r * SPLIT + at] * values.number_at(at, k);
    }
  }
}

// Scores [count] become e^(capped score - top).
template <bool capped>
Partial exponentials_of(float* scores, int64_t count, const Cap& cap) {
  float sum = 0.0f, slope;
  if constexpr (capped) {
#pragma omp simd private(slope)
    for (int64_t j = 0; j < count; j++) scores[j] = value<true, true>(scores[j], cap, slope);
  }
  const float top = largest(scores, count, -1e30f);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; j++) {
    scores[j] = power<false, true>(scores[j] - top);
    sum += scores[j];
  }
  return {top, sum};
}

// x [d] to where it is kept.
template <class T>
void keep(const float* x, int64_t d, T* to, float* scales) {
  if constexpr (has_scales<T>) {
    for (int64_t start = 0; start < d; start += BLOCK) {
      const int64_t stop = std::min(d, start + BLOCK);
      float top = 0.0f, finite = 0.0f;
      for (int64_t k = start; k < stop; k++) {
        top = std::max(top, std::fabs(x[k]));
        finite += x[k] * 0.0f;
      }
      const bool sound = finite == 0.0f;
      const float by = sound ? 1.0f / std::max(top / 127.0f, 1e-30f) : 0.0f;
      *scales++ = sound ? top / 127.0f : NAN;
      for (int64_t k = start; k < stop; k++) to[k] = int8_t(std::nearbyint(sound ? x[k] * by : 0.0f));
    }
  } else {
    for (int64_t k = 0; k < d; k++) store(to[k], x[k]);
  }
}

// R queries [R, d], ordered, over keys at positions [first, first + count), count <= SPLIT. While keys are read values
// are asked for, and while these are what lies from `following` on: memory is never waited for, however short a part is.
template <class T, int R>
void attend(const float* queries, const Ring<T>& keys, const Ring<T>& values, int64_t first, int64_t count, double softcap,
            const T* following, Partial* partials, float* out) {
  constexpr int64_t lot = 4;  // values of a stream that are added before the others' next
  const int64_t d = keys.d, start = first % keys.size, before = std::min(count, keys.size - start);
  alignas(64) float scores[R * SPLIT];
  // f(place in memory, number of the key, how many) for those that lie together.
  const auto each_run = [&](const auto& f) {
    f(start, int64_t(0), before);
    if (before < count) f(int64_t(0), before, count - before);
  };
  each_run([&](int64_t at, int64_t j, int64_t some) {
    const int64_t apart = some / STREAMS;
    const auto score = [&](auto streams, int64_t i) {
      const Ring<T> from = keys.from(at + i);
      scores_of<T, R, streams()>(queries, from, apart, values.from(at + i).data, scores + j + i);
    };
    for (int64_t i = 0; i < apart; i++) score(std::integral_constant<int, STREAMS>{}, i);
    for (int64_t i = STREAMS * apart; i < some; i++) score(std::integral_constant<int, 1>{}, i);
  });
  const Cap cap(softcap);
  for (int r = 0; r < R; r++) {
    float* row = scores + r * SPLIT;
    partials[r] = softcap > 0 ? exponentials_of<true>(row, count, cap) : exponentials_of<false>(row, count, cap);
  }
  std::fill(out, out + R * d, 0.0f);
  each_run([&](int64_t at, int64_t j, int64_t some) {
    const int64_t apart = some / STREAMS;
    const auto add = [&](auto streams, int64_t i, int64_t values_of_it) {
      const Ring<T> from = values.from(at + i);
      add_values<T, R, streams()>(scores + j + i, from, apart, values_of_it, following + (j + i) * d, out);
    };
    for (int64_t i = 0; i < apart; i += lot) {
      add(std::integral_constant<int, STREAMS>{}, i, std::min(lot, apart - i));
    }
    const int64_t rest = STREAMS * apart;
    if (rest < some) add(std::integral_constant<int, 1>{}, rest, some - rest);
  });
}

// The same for any number of queries.
template <class T>
void attend_all(int64_t heads, const float* queries, const Ring<T>& keys, const Ring<T>& values, int64_t first,
                int64_t count, double softcap, const T* following, Partial* partials, float* out) {
  const int64_t d = keys.d;
  for (int64_t r = 0; r < heads; r += HEADS, queries += HEADS * d, partials += HEADS, out += HEADS * d) {
    switch (std::min<int64_t>(HEADS, heads - r)) {
      case 1: attend<T, 1>(queries, keys, values, first, count, softcap, following, partials, out); break;
      case 2: attend<T, 2>(queries, keys, values, first, count, softcap, following, partials, out); break;
      case 3: attend<T, 3>(queries, keys, values, first, count, softcap, following, partials, out); break;
      default: attend<T, 4>(queries, keys, values, first, count, softcap, following, partials, out);
    }
  }
}

// One head's answer [d] from its parts: partials[s * stride], outs[s * stride * d], s < splits. mixed: room for [d].
template <class T>
void combine(const Partial* partials, const float* outs, int64_t stride, int64_t splits, int64_t d, float* mixed,
             float* answer) {
  float top = -1e30f, sum = 0.0f;
  for (int64_t s = 0; s < splits; s++) top = std::max(top, partials[s * stride].top);
  for (int64_t s = 0; s < splits; s++) sum += std::exp(partials[s * stride].top - top) * partials[s * stride].sum;
  std::fill(mixed, mixed + d, 0.0f);
  for (int64_t s = 0; s < splits; s++) {
    const float weight = std::exp(partials[s * stride].top - top) / sum;
    const float* from = outs + s * stride * d;
#pragma omp simd
    for (int64_t k = 0; k < d; k++) mixed[k] += weight * from[k];
  }
  order_back<T>(mixed, d, answer);
}

}  // namespace gemstill
