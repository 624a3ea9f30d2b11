// Products of a panel with up to 4 vectors for AVX2. Bytes are widened, to be multiplied with the activations' 16 bits;
// nibbles are multiplied with their high and low 8 bits as they are: eight sums of two products fit into 16 bits.

#pragma once

#include <immintrin.h>

#include "packed_layout.h"

namespace gemstill {

constexpr int VECTORS = 4;  // that a panel is multiplied with at once: their sums stay in registers

inline __m256i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

inline __m256i broadcast4(const int16_t* x) {
  int64_t four;
  std::memcpy(&four, x, 8);
  return _mm256_set1_epi64x(four);
}

inline __m256 halves_at(const uint8_t* at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)); }

inline __m256 bytes_at(const uint8_t* at, bool with_sign) {
  const __m128i eight = _mm_loadl_epi64((const __m128i*)at);
  return _mm256_cvtepi32_ps(with_sign ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight));
}

// Whole products of 8 rows' integers in `lots` lots from q on with M vectors, from their number `at` on.
template <int M, int lots>
void multiply_bytes(const uint8_t* q, const Activations& x, int64_t at, __m256i* products) {
  __m256i left[M], right[M];  // of 4 rows each, in two parts
  for (int m = 0; m < M; m++) left[m] = right[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int j = 0; j < lots; j++) {
    const __m256i a = _mm256_cvtepu8_epi16(_mm_load_si128((const __m128i*)(q + 64 * j)));
    const __m256i b = _mm256_cvtepu8_epi16(_mm_load_si128((const __m128i*)(q + 64 * j + 16)));
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const __m256i by = broadcast4(x.whole.data() + m * x.width + at + 4 * j);
      left[m] = _mm256_add_epi32(left[m], _mm256_madd_epi16(a, by));
      right[m] = _mm256_add_epi32(right[m], _mm256_madd_epi16(b, by));
    }
  }
  for (int m = 0; m < M; m++) {
    products[m] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(left[m], right[m]), 0b11011000);
  }
}

template <int M>
void multiply_nibbles(const uint8_t* q, const Activations& x, int64_t at, __m256i* products) {
  const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  __m256i upper[M], lower[M];
  for (int m = 0; m < M; m++) upper[m] = lower[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m256i both = _mm256_load_si256((const __m256i*)(q + 64 * j));
    const __m256i a = _mm256_and_si256(both, nibble), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const int8_t *high = x.high.data() + m * x.width + at + 8 * j, *low = x.low.data() + m * x.width + at + 8 * j;
      upper[m] = _mm256_add_epi16(upper[m], _mm256_maddubs_epi16(a, broadcast4(high)));
      lower[m] = _mm256_add_epi16(lower[m], _mm256_maddubs_epi16(a, broadcast4(low)));
      upper[m] = _mm256_add_epi16(upper[m], _mm256_maddubs_epi16(b, broadcast4(high + 4)));
      lower[m] = _mm256_add_epi16(lower[m], _mm256_maddubs_epi16(b, broadcast4(low + 4)));
    }
  }
  for (int m = 0; m < M; m++) {
    const __m256i whole = _mm256_slli_epi32(_mm256_madd_epi16(upper[m], one), 7);
    products[m] = _mm256_add_epi32(whole, _mm256_madd_epi16(lower[m], one));
  }
}

// sums [M, 16] = the products of a panel with vectors first, …, first + M - 1.
template <Kind kind, int M>
void multiply_panel(const Panel& panel, const Activations& x, int64_t first, float* sums) {
  constexpr int parts = kind == Kind::q6_k ? 2 : 1;
  constexpr int64_t bytes = (in_nibbles<kind> ? 256 : 512) / parts;
  const int32_t* less = (parts == 2 ? x.halves : x.sums).data() + first * x.blocks * parts;
  const float *scales = x.scales.data() + first * x.blocks, *totals = x.totals.data() + first * x.blocks;
  const uint8_t *q = panel.integers, *by = panel.scales;
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
        if constexpr (in_nibbles<kind>) {
          multiply_nibbles<M>(q + 32 * half, x, at, products);
        } else {
          multiply_bytes<M, 8 / parts>(q + 32 * half, x, at, products);
        }
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
      for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch((const char*)q + AHEAD + line, _MM_HINT_T0);
      q += bytes;
      by += !in_eights<kind> || has_least<kind> ? 32 : 16;
    }
  }
  for (int m = 0; m < M; m++) {
    for (int half = 0; half < 2; half++) _mm256_storeu_ps(sums + m * PANEL + 8 * half, sum[half][m]);
  }
}

}  // namespace gemstill
