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

// 2 LANES weights as floats: for bfloat16 those at even places, then those at odd ones.
inline void weights_at(const float* from, Floats& a, Floats& b) {
  a = vector_at<Floats>(from);
  b = vector_at<Floats>(from + LANES);
}
inline void weights_at(const uint16_t* from, Floats& a, Floats& b) {
  const Words both = vector_at<Words>(from);
  a = (Floats)(both << 16);
  b = (Floats)(both & 0xffff0000u);
}

// sums [R, M] of R rows of K weights, `apart` from one another, with vectors first, …, first + M - 1.
template <class T, int R, int M>
void multiply_tile(const T* rows, int64_t apart, int64_t K, const Activations& x, int64_t first, float* sums) {
  constexpr int64_t step = 2 * LANES;
  // In blocks of 32, of bfloat16's activations 16 lie at even places: with 8 lanes two steps share a block.
  constexpr bool permuted = sizeof(T) == 2;
  Floats sum[R][M];
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) sum[r][m] = Floats{};
  }
  const float* by = x.values.data() + first * x.width;
  const auto add = [&](const T* from, int64_t stride, int64_t k) {
    const int64_t even = permuted ? k / BLOCK * BLOCK + k % BLOCK / 2 : k, odd = even + (permuted ? BLOCK / 2 : LANES);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      Floats a, b;
      weights_at(from + r * stride, a, b);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        sum[r][m] += a * vector_at<Floats>(by + m * x.width + even);
        sum[r][m] += b * vector_at<Floats>(by + m * x.width + odd);
      }
    }
  };
  int64_t k = 0;
  for (; k + step <= K; k += step) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const T* later = rows + r * apart + k + AHEAD / sizeof(T);
      __builtin_prefetch(later, 0, 2);
      if (step * sizeof(T) > 64) __builtin_prefetch(later + step / 2, 0, 2);
    }
    add(rows + k, apart, k);
  }
  if (k < K) {
    T rest[R][step] = {};
    for (int r = 0; r < R; r++) std::copy(rows + r * apart + k, rows + r * apart + K, rest[r]);
    add(rest[0], step, k);
  }
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) sums[r * M + m] = total(sum[r][m]);
  }
}

// The same for count <= M vectors: out[m * stride + r * ahead].
template <class T, int R, int M>
void multiply_some(const T* rows, int64_t apart, const Activations& x, int64_t first, int64_t count, float* out,
                   int64_t stride, int64_t ahead) {
  if constexpr (M > 1) {
    if (count < M) return multiply_some<T, R, M - 1>(rows, apart, x, first, count, out, stride, ahead);
  }
  float sums[R * M];
  multiply_tile<T, R, M>(rows, apart, x.K, x, first, sums);
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) out[m * stride + r * ahead] = sums[r * M + m];
  }
}

template <class T>
void multiply_rows(const T* weights, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride) {
  // Four rows at once, from four places far apart: memory answers several streams faster than one.
  constexpr int R = 4, most = LANES == 16 ? 4 : 2;
  const int64_t tiles = (x.M + most - 1) / most, quarter = (end - begin) / R;
  const T* from = weights + begin * x.K;
  const auto each_tile = [&](const auto& f) {
    for (int64_t tile = 0; tile < tiles; tile++) f(x.M * tile / tiles, x.M * (tile + 1) / tiles);
  };
  for (int64_t i = 0; i < quarter; i++) {
    each_tile([&](int64_t m, int64_t stop) {
      multiply_some<T, R, most>(from + i * x.K, quarter * x.K, x, m, stop - m, out + m * stride + i, stride, quarter);
    });
  }
  for (int64_t i = R * quarter; i < end - begin; i++) {
    each_tile([&](int64_t m, int64_t stop) {
      multiply_some<T, 1, most>(from + i * x.K, 0, x, m, stop - m, out + m * stride + i, stride, 0);
    });
  }
}

}  // namespace gemstill
