// Products of a panel with up to 4 vectors for AVX2. Words of 16 bits hold two bytes or four nibbles; masked and shifted
// they are integers that are multiplied with the activations' 15 bits, two at once.

#pragma once

#include <immintrin.h>

#include "packed_layout.h"

namespace gemstill {

constexpr int VECTORS = 4;  // that a panel is multiplied with at once: their sums stay in registers

template <Kind kind, int64_t M>
constexpr int64_t distance = LATER;  // bytes ahead that are asked for, into the second cache

inline __m256i pair_at(const int16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return _mm256_set1_epi32(two);
}

inline __m256 halves_at(const uint8_t* at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)); }

inline __m256 bytes_at(const uint8_t* at, bool with_sign) {
  const __m128i eight = _mm_loadl_epi64((const __m128i*)at);
  return _mm256_cvtepi32_ps(with_sign ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight));
}

// Whole products of 8 rows' integers in `lots` lots from q on with M vectors from x on, `width` apart.
template <int M, int lots, bool nibbles>
void multiply_words(const uint8_t* q, const int16_t* x, int64_t width, __m256i* products) {
  const __m256i mask = _mm256_set1_epi16(nibbles ? 15 : 255);
  __m256i sum[M], other[M];
  for (int m = 0; m < M; m++) sum[m] = other[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int j = 0; j < lots; j++) {
    const __m256i words = _mm256_loadu_si256((const __m256i*)(q + 64 * j));
    if constexpr (nibbles) {  // 0, 2 and 4, 6 and 1, 3 and 5, 7 of each 8
      const __m256i a = _mm256_and_si256(words, mask), b = _mm256_and_si256(_mm256_srli_epi16(words, 4), mask);
      const __m256i c = _mm256_and_si256(_mm256_srli_epi16(words, 8), mask), d = _mm256_srli_epi16(words, 12);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const int16_t* by = x + m * width + 8 * j;
        sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(a, pair_at(by)));
        other[m] = _mm256_add_epi32(other[m], _mm256_madd_epi16(b, pair_at(by + 2)));
        sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(c, pair_at(by + 4)));
        other[m] = _mm256_add_epi32(other[m], _mm256_madd_epi16(d, pair_at(by + 6)));
      }
    } else {  // 0, 2 and 1, 3 of each 4
      const __m256i a = _mm256_and_si256(words, mask), b = _mm256_srli_epi16(words, 8);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const int16_t* by = x + m * width + j / 2 * 8 + j % 2 * 2;
        sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(a, pair_at(by)));
        other[m] = _mm256_add_epi32(other[m], _mm256_madd_epi16(b, pair_at(by + 4)));
      }
    }
  }
  for (int m = 0; m < M; m++) products[m] = _mm256_add_epi32(sum[m], other[m]);
}

// sums [M, 16] = the products of a panel with vectors first, …, first + M - 1.
template <Kind kind, int M>
void multiply_panel(const Panel& panel, const Activations& x, int64_t first, float* sums) {
  constexpr int parts = kind == Kind::q6_k ? 2 : 1;
  constexpr int64_t bytes = (in_nibbles<kind> ? 256 : 512) / parts;
  const int32_t* less = (parts == 2 ? x.halves : x.sums).data() + first * x.blocks * parts;
  const float *scales = x.scales.data() + first * x.blocks, *totals = x.totals.data() + first * x.blocks;
  const uint8_t *q = panel.integers, *by = panel.scales, *ahead = panel.ahead;
  __m256 sum[2][M], d[2], least[2];
  for (int m = 0; m < M; m++) sum[0][m] = sum[1][m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < x.blocks; b++) {
    if (in_eights<kind> && b % 8 == 0) {
      for (int half = 0; half < 2; half++) {
        d[half] = halves_at(by + 16 * half);
        if constexpr (has_least<kind>) least[half] = halves_at(by + 32 + 16 * half);
      }
      by += has_least<kind> ? 64 : 32;
    }
    for (int part = 0; part < parts; part++) {
      const int64_t at = first * x.width + b * BLOCK + part * (BLOCK / 2);
      for (int half = 0; half < 2; half++) {
        __m256i products[M];
        constexpr int lots = (in_nibbles<kind> ? 4 : 8) / parts;
        multiply_words<M, lots, in_nibbles<kind>>(q + 32 * half, x.whole.data() + at, x.width, products);
        __m256 scale, minimum;
        if constexpr (!in_eights<kind>) {
          scale = halves_at(by + 16 * half);
        } else {
          scale = d[half] * bytes_at(by + 8 * half, kind == Kind::q6_k);
          if constexpr (has_least<kind>) minimum = least[half] * bytes_at(by + 16 + 8 * half, false);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          __m256i product = products[m];
          if constexpr (offset_bits<kind> > 0) {
            const __m256i none = _mm256_set1_epi32(less[(m * x.blocks + b) * parts + part]);
            product = _mm256_add_epi32(product, _mm256_slli_epi32(none, offset_bits<kind>));
          }
          const __m256 factor = scale * _mm256_set1_ps(scales[m * x.blocks + b]);
          sum[half][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), factor, sum[half][m]);
          if constexpr (has_least<kind>) {
            sum[half][m] = _mm256_fnmadd_ps(minimum, _mm256_set1_ps(totals[m * x.blocks + b]), sum[half][m]);
          }
        }
      }
      for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch((const char*)ahead + line, _MM_HINT_T1);
      ahead += bytes;
      q += bytes;
      by += !in_eights<kind> || has_least<kind> ? 32 : 16;
    }
  }
  for (int m = 0; m < M; m++) {
    for (int half = 0; half < 2; half++) _mm256_storeu_ps(sums + m * PANEL + 8 * half, sum[half][m]);
  }
}

}  // namespace gemstill
