// Products of a panel with one vector for processors without AVX2: the same integers in plain loops.

#pragma once

#include "packed_layout.h"

namespace gemstill {

constexpr int VECTORS = 1;

template <Kind kind, int64_t M>
constexpr int64_t distance = 0;

// sums [16] = the products of a panel with vector `first`.
template <Kind kind, int M>
void multiply_panel(const Panel& panel, const Activations& x, int64_t first, float* sums) {
  static_assert(M == 1);
  constexpr int parts = kind == Kind::q6_k ? 2 : 1;
  std::fill(sums, sums + PANEL, 0.0f);
  for (int64_t b = 0; b < x.blocks; b++) {
    for (int part = 0; part < parts; part++) {
      int32_t products[PANEL];
      const int32_t less = (parts == 2 ? x.halves : x.sums)[(first * x.blocks + b) * parts + part];
      std::fill(products, products + PANEL, less * (offset_bits<kind> ? 1 << offset_bits<kind> : 0));
      const int16_t* a = x.whole.data() + first * x.width + b * BLOCK;
      for (int k = part * BLOCK / parts; k < (part + 1) * BLOCK / parts; k++) {
        for (int r = 0; r < PANEL; r++) {
          products[r] += integer_at<kind>(panel, b, r, k) * a[k / 8 * 8 + k % 2 * 4 + k % 8 / 2];
        }
      }
      const float scale = x.scales[first * x.blocks + b], total = x.totals[first * x.blocks + b];
      for (int r = 0; r < PANEL; r++) {
        const Affine affine = affine_at<kind>(panel, b, part, r);
        sums[r] += float(products[r]) * affine.scale * scale - affine.least * total;
      }
    }
  }
}

}  // namespace gemstill
