// Products of rows as tensors have them, float32 or bfloat16, with a few vectors: weights are read once, in their
// place, and sums stay in registers.

#pragma once

#include "packed_layout.h"

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

inline float total(Floats x) {
  float halves[LANES];
  std::memcpy(halves, &x, sizeof(x));
  for (int left = LANES / 2; left > 0; left /= 2) {
    for (int i = 0; i < left; i++) halves[i] += halves[i + left];
  }
  return halves[0];
}

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

// sums [R, M] of R rows [R, K] from `rows` on with vectors first, …, first + M - 1.
template <class T, int R, int M>
void multiply_tile(const T* rows, int64_t K, const Activations& x, int64_t first, float* sums) {
  constexpr int64_t step = 2 * LANES;
  // In blocks of 32, of bfloat16's activations 16 lie at even places: with 8 lanes two steps share a block.
  constexpr bool apart = sizeof(T) == 2;
  Floats sum[R][M];
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) sum[r][m] = Floats{};
  }
  const float* by = x.values.data() + first * x.width;
  const auto add = [&](const T* from, int64_t stride, int64_t k) {
    const int64_t even = apart ? k / BLOCK * BLOCK + k % BLOCK / 2 : k, odd = even + (apart ? BLOCK / 2 : LANES);
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
    for (int r = 0; r < R; r++) __builtin_prefetch(rows + r * K + k + 1024 / sizeof(T));
    add(rows + k, K, k);
  }
  if (k < K) {
    T rest[R][step] = {};
    for (int r = 0; r < R; r++) std::copy(rows + r * K + k, rows + (r + 1) * K, rest[r]);
    add(rest[0], step, k);
  }
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) sums[r * M + m] = total(sum[r][m]);
  }
}

template <class T, int R, int M>
void multiply_some(const T* rows, int64_t K, const Activations& x, int64_t first, int64_t count, float* sums) {
  if constexpr (M > 1) {
    if (count < M) return multiply_some<T, R, M - 1>(rows, K, x, first, count, sums);
  }
  multiply_tile<T, R, M>(rows, K, x, first, sums);
}

template <class T>
void multiply_rows(const T* weights, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride) {
  constexpr int R = 4, most = LANES == 16 ? 4 : 2;
  const int64_t tiles = (x.M + most - 1) / most;
  float sums[R * most];
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min<int64_t>(R, end - row);
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t first = x.M * tile / tiles, count = x.M * (tile + 1) / tiles - first;
      for (int64_t r = 0; r < rows; r += rows == R ? R : 1) {
        const T* from = weights + (row + r) * x.K;
        if (rows == R) {
          multiply_some<T, R, most>(from, x.K, x, first, count, sums);
        } else {
          multiply_some<T, 1, most>(from, x.K, x, first, count, sums);
        }
        for (int64_t i = 0; i < (rows == R ? R : 1); i++) {
          for (int64_t m = 0; m < count; m++) out[(first + m) * stride + row + r + i - begin] = sums[i * count + m];
        }
      }
    }
  }
}

}  // namespace gemstill
