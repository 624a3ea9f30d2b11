// Products of a panel with up to 8 vectors for AVX-512 with VNNI: one instruction for 16 rows and 4 weights of each.

#pragma once

#include <immintrin.h>

#include "packed_layout.h"

namespace gemstill {

constexpr int VECTORS = 8;  // that a panel is multiplied with at once: their sums stay in registers

// Bytes ahead that are asked for: into the first cache where one vector leaves little to do meanwhile, into the second,
// and earlier, where there is more.
template <Kind kind, int64_t M>
constexpr int64_t distance = M == 1 && !in_nibbles<kind> ? AHEAD : LATER;

inline __m512i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 halves_at(const uint8_t* at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)); }

// sums [M, 16] = the products of a panel with vectors first, …, first + M - 1.
template <Kind kind, int M>
void multiply_panel(const Panel& panel, const Activations& x, int64_t first, float* sums) {
  constexpr int parts = kind == Kind::q6_k ? 2 : 1, lots = 8 / parts;
  const int8_t *high = x.high.data() + first * x.width, *low = x.low.data() + first * x.width;
  const int32_t* less = (parts == 2 ? x.halves : x.sums).data() + first * x.blocks * parts;
  const float *scales = x.scales.data() + first * x.blocks, *totals = x.totals.data() + first * x.blocks;
  const uint8_t *q = panel.integers, *by = panel.scales, *ahead = panel.ahead;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sum[M], d, least;
  for (int m = 0; m < M; m++) sum[m] = _mm512_setzero_ps();
  for (int64_t b = 0; b < x.blocks; b++) {
    if (in_eights<kind> && b % 8 == 0) {
      d = halves_at(by);
      by += 32;
      if constexpr (has_least<kind>) {
        least = halves_at(by);
        by += 32;
      }
    }
    for (int part = 0; part < parts; part++) {
      __m512i upper[M], lower[M];
      for (int m = 0; m < M; m++) {
        upper[m] = _mm512_setzero_si512();
        const __m512i none = _mm512_set1_epi32(less[(m * x.blocks + b) * parts + part]);
        lower[m] = offset_bits<kind> ? _mm512_slli_epi32(none, offset_bits<kind>) : _mm512_setzero_si512();
      }
      __m512i both;
#pragma GCC unroll 8
      for (int j = 0; j < lots; j++) {
        __m512i w;
        if constexpr (in_nibbles<kind>) {
          if (j % 2 == 0) {
            both = _mm512_loadu_si512(q + 32 * j);
            w = _mm512_and_si512(both, nibble);
          } else {
            w = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
          }
        } else {
          w = _mm512_loadu_si512(q + 64 * j);
        }
        const int64_t at = b * BLOCK + 4 * (part * lots + j);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          upper[m] = _mm512_dpbusd_epi32(upper[m], w, broadcast4(high + m * x.width + at));
          lower[m] = _mm512_dpbusd_epi32(lower[m], w, broadcast4(low + m * x.width + at));
        }
      }
#pragma GCC unroll 8
      for (int line = 0; line < (in_nibbles<kind> ? lots / 2 : lots); line++) {
        if constexpr (distance<kind, M> == AHEAD) {
          _mm_prefetch((const char*)ahead + 64 * line, _MM_HINT_T0);
        } else {
          _mm_prefetch((const char*)ahead + 64 * line, _MM_HINT_T1);
        }
      }
      ahead += (in_nibbles<kind> ? 32 : 64) * lots;
      q += (in_nibbles<kind> ? 32 : 64) * lots;
      __m512 scale, minimum;
      if constexpr (!in_eights<kind>) {
        scale = halves_at(by);
        by += 32;
      } else if constexpr (has_least<kind>) {
        scale = d * _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)by)));
        minimum = least * _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(by + 16))));
        by += 32;
      } else {
        scale = d * _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)by)));
        by += 16;
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const __m512i product = _mm512_add_epi32(_mm512_slli_epi32(upper[m], 7), lower[m]);
        const __m512 factor = scale * _mm512_set1_ps(scales[m * x.blocks + b]);
        sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, sum[m]);
        if constexpr (has_least<kind>) {
          sum[m] = _mm512_fnmadd_ps(minimum, _mm512_set1_ps(totals[m * x.blocks + b]), sum[m]);
        }
      }
    }
  }
  for (int m = 0; m < M; m++) _mm512_storeu_ps(sums + m * PANEL, sum[m]);
}

}  // namespace gemstill
