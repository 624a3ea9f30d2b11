// Products of rows as tensors have them, float32 or bfloat16, with a few vectors: weights are read once, in their
// place, and sums stay in registers.

#pragma once

#include "packed_layout.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace gemstill {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));

template <class V>
V vector_at(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

#if defined(__AVX512F__)
inline float total(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
#elif defined(__AVX__)
inline float total(Floats x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#else
inline float total(Floats x) {
  float halves[LANES];
  std::memcpy(halves, &x, sizeof(x));
  for (int left = LANES / 2; left > 0; left /= 2) {
    for (int i = 0; i < left; i++) halves[i] += halves[i + left];
  }
  return halves[0];
}
#endif

// Four vectors' totals, each the one that `total` gives.
#ifdef __AVX512F__
inline void totals_of(const Floats* x, float* to) {
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const __m512 ab = halves((__m512)x[0], (__m512)x[1]), cd = halves((__m512)x[2], (__m512)x[3]);
  __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
  const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(places, all)));
}
#else
inline void totals_of(const Floats* x, float* to) {
  for (int i = 0; i < 4; i++) to[i] = total(x[i]);
}
#endif

// LANES of 2 LANES weights as floats: of bfloat16 those at even or at odd places, of float32 the first or the last.
template <bool second>
Floats weights_at(const float* from) {
  return vector_at<Floats>(from + (second ? LANES : 0));
}
template <bool second>
Floats weights_at(const uint16_t* from) {
  const Words both = vector_at<Words>(from);
  return second ? (Floats)(both & 0xffff0000u) : (Floats)(both << 16);
}
template <class T>
void weights_at(const T* from, Floats& a, Floats& b) {
  a = weights_at<false>(from);
  b = weights_at<true>(from);
}

// Whether this processor multiplies pairs of bfloat16 and adds them to floats: twice as many as it multiplies floats.
#ifdef __AVX512BF16__
constexpr bool ROUNDS = true;
#else
constexpr bool ROUNDS = false;
#endif

constexpr int ROWS = 4, TOKENS = LANES == 16 ? 6 : 2;  // of a tile at most: its sums stay in registers
// Bytes ahead of those being multiplied that are asked for, into the first cache: from the second one, which is as far as
// requests for more go, four streams take a fifth longer.
constexpr int64_t NEAR = 2048;
constexpr int64_t LOT = 1 << 17;  // bytes of weights that stay in the second cache until all vectors have read them

template <class T>
struct Weights {  // rows, from one place to the next `apart` numbers
  const T* data;
  int64_t apart;

  Weights from(int64_t row) const { return {data + row * apart, apart}; }
};

// sums [M, R] of R rows of K weights with vectors first, …, first + M - 1; `rounded`: of those that are bfloat16, which
// are counted by themselves. Meanwhile asks for so many rows of `asked`: all R into the first cache, fewer into the
// second.
template <class T, bool rounded, int R, int M, int asks>
void multiply_tile(const Weights<T>& rows, int64_t K, const Activations& x, int64_t first, const Weights<T>& asked,
                   float* sums) {
  constexpr int64_t step = 2 * LANES, line = 64 / sizeof(T);
  // In blocks of 32, of bfloat16's activations 16 lie at even places: with 8 lanes two steps share a block.
  constexpr bool permuted = sizeof(T) == 2;
  Floats sum[M][R];  // all loops are unrolled, or it would be in memory
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[m][r] = Floats{};
  }
  const float* by = x.values.data() + first * x.width;
  const auto add_half = [&](auto second, const Weights<T>& from, int64_t at) __attribute__((always_inline)) {
    Floats w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) w[r] = weights_at<second()>(from.data + r * from.apart);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      Floats one = vector_at<Floats>(by + m * x.width + at);
#ifdef __AVX__
      asm("" : "+v"(one));  // loaded once for all rows: compilers would load it again for each
#endif
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum[m][r] += w[r] * one;
    }
  };
  const auto add = [&](const Weights<T>& from, int64_t k) __attribute__((always_inline)) {
#ifdef __AVX512BF16__
    if constexpr (rounded) {
      __m512bh w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) w[r] = vector_at<__m512bh>(from.data + r * from.apart);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        __m512bh one = vector_at<__m512bh>(x.rounded.data() + (first + m) * x.width + k);
        asm("" : "+v"(one));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[m][r] = (Floats)_mm512_dpbf16_ps((__m512)sum[m][r], w[r], one);
      }
      return;
    }
#endif
    const int64_t even = permuted ? k / BLOCK * BLOCK + k % BLOCK / 2 : k, odd = even + (permuted ? BLOCK / 2 : LANES);
    add_half(std::false_type{}, from, even);
    add_half(std::true_type{}, from, odd);
  };
  int64_t k = 0;
  for (; k + step <= K; k += step) {
#pragma GCC unroll 4
    for (int r = 0; r < asks; r++) {
      const T* later = asked.data + r * asked.apart + k;
      __builtin_prefetch(later, 0, asks == R ? 3 : 2);
      if (step > line) __builtin_prefetch(later + line, 0, asks == R ? 3 : 2);
    }
    add({rows.data + k, rows.apart}, k);
  }
  if (k < K) {
    T rest[R][step] = {};
    for (int r = 0; r < R; r++) std::copy(rows.data + r * rows.apart + k, rows.data + r * rows.apart + K, rest[r]);
    add({rest[0], step}, k);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    if constexpr (R == 4) {
      totals_of(sum[m], sums + m * R);
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sums[m * R + r] = total(sum[m][r]);
    }
  }
}

// The same for count <= M vectors: out[m * stride + r * ahead].
template <bool rounded, int R, int asks, int M = TOKENS, class T>
void multiply_some(const Weights<T>& rows, const Activations& x, int64_t first, int64_t count, const Weights<T>& asked,
                   float* out, int64_t stride, int64_t ahead) {
  if constexpr (M > 1) {
    if (count < M) return multiply_some<rounded, R, asks, M - 1>(rows, x, first, count, asked, out, stride, ahead);
  }
  float sums[R * M];
  multiply_tile<T, rounded, R, M, asks>(rows, x.K, x, first, asked, sums);
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) out[m * stride + r * ahead] = sums[m * R + r];
  }
}

// out[m * stride + n] = the product of row n < count and vector m. next: what is read afterwards.
template <class T>
void multiply_rows(const T* weights, const Activations& x, int64_t count, const T* next, float* out, int64_t stride) {
  const auto tiles_of = [](int64_t vectors) { return (vectors + TOKENS - 1) / TOKENS; };
  const int64_t K = x.K, whole = count / ROWS * ROWS, rest = x.M - x.exact;
  // f(rounded, first, count, number) for tiles of about the same size each; out of all their vectors, `first` counts
  // those of a kind.
  const auto each_tile = [&](const auto& f) {
    int64_t number = 0;
    const auto go = [&](auto rounded, int64_t vectors) {
      const int64_t tiles = tiles_of(vectors);
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = vectors * tile / tiles;
        f(rounded, first, vectors * (tile + 1) / tiles - first, number++);
      }
    };
    go(std::false_type{}, x.exact);
    if constexpr (ROUNDS && sizeof(T) == 2) go(std::true_type{}, rest);
  };
  const auto to = [&](auto rounded, int64_t first) { return out + (rounded() ? x.exact + first : first) * stride; };
  if (tiles_of(x.exact) + tiles_of(rest) < ROWS) {
    // Memory is what is waited for. Rows are read at four places far apart: it answers several streams faster than one.
    const int64_t apart = whole / ROWS;
    for (int64_t n = 0; n < apart; n++) {
      const Weights<T> rows{weights + n * K, apart * K}, asked{rows.data + NEAR / sizeof(T), rows.apart};
      each_tile([&](auto rounded, int64_t m, int64_t some, int64_t number) {
        float* at = to(rounded, m) + n;
        if (number == 0) return multiply_some<rounded(), ROWS, ROWS>(rows, x, m, some, asked, at, stride, apart);
        multiply_some<rounded(), ROWS, 0>(rows, x, m, some, asked, at, stride, apart);
      });
    }
  } else {
    // Products are. A few vectors stay in the first cache while they go through a lot of rows, and the next lot is
    // asked for, a row for each four.
    const int64_t fours = whole / ROWS, lots = (whole * K * int64_t(sizeof(T)) + LOT - 1) / LOT;
    for (int64_t lot = 0; lot < lots; lot++) {
      const int64_t start = fours * lot / lots * ROWS, stop = fours * (lot + 1) / lots * ROWS;
      const int64_t apart = (stop - start) / ROWS;
      Weights<T> asked{stop < whole ? weights + stop * K : next, K};
      each_tile([&](auto rounded, int64_t m, int64_t some, int64_t) {
        for (int64_t n = start; n < start + apart; n++, asked = asked.from(1)) {
          const Weights<T> rows{weights + n * K, apart * K};
          multiply_some<rounded(), ROWS, 1>(rows, x, m, some, asked, to(rounded, m) + n, stride, apart);
        }
      });
    }
  }
  for (int64_t n = whole; n < count; n++) {
    const Weights<T> row{weights + n * K, 0};
    each_tile([&](auto rounded, int64_t m, int64_t some, int64_t) {
      multiply_some<rounded(), 1, 0>(row, x, m, some, row, to(rounded, m) + n, stride, 0);
    });
  }
}

}  // namespace gemstill
