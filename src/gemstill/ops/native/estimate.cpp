// What an estimator of a distribution asks of a row of logits: the mass of each block of a few entries, and the
// largest entry in it. The exponentials themselves are never written.

#include "common.h"

namespace {

// Of each LANES x size entries in a row, block l has those at l, l + LANES, l + 2 LANES, …: sums over it need no
// sums across a vector.
constexpr int64_t LANES = 32;

template <class T, bool capped>
void block_mass_row(const T* raw, int64_t V, int64_t size, const Cap& cap, double* sums, float* tops, float* top) {
  constexpr bool precise = true;  // an estimate is unbiased for what is summed here
  float slope;
  const float most = value<capped, precise>(largest(raw, V, -1e30f), cap, slope);
  *top = most;
  for (int64_t tile = 0; tile < V; tile += LANES * size, sums += LANES, tops += LANES) {
    float sum[LANES] = {}, peak[LANES] = {};
    for (int64_t k = 0; k < size; k++) {
      const T* x = raw + tile + k * LANES;
#pragma omp simd
      for (int64_t l = 0; l < LANES; l++) {
        float steep;
        const float z = load(x[l]), there = power<false, precise>(value<capped, precise>(z, cap, steep) - most);
        const float e = z < -3.4e38f ? 0.0f : there;  // padding
        sum[l] += e;
        peak[l] = e > peak[l] ? e : peak[l];
      }
    }
    for (int64_t l = 0; l < LANES; l++) {
      sums[l] = sum[l];
      tops[l] = peak[l];
    }
  }
}

// raw [n, V], V a multiple of LANES size; sums [n, V / size] double and tops [n, V / size] of e^(z - top); top [n],
// the largest z.
void block_mass(Tensor raw, Tensor sums, Tensor tops, Tensor top, double softcap, double temperature) {
  const int64_t n = raw.size(0), V = raw.size(1), B = sums.size(1), size = V / B;
  STD_TORCH_CHECK(V == B * size && B % LANES == 0, "no whole number of blocks");
  const Cap cap(softcap, temperature);
  by_dtype(raw, [&](auto type) {
    using T = decltype(type);
    over(n, V, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const auto row = softcap > 0 ? block_mass_row<T, true> : block_mass_row<T, false>;
        row(pointer<T>(raw) + i * V, V, size, cap, pointer<double>(sums) + i * B, pointer<float>(tops) + i * B,
            pointer<float>(top) + i);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemstill, m) {
  m.def("block_mass(Tensor raw, Tensor(a!) sums, Tensor(b!) tops, Tensor(c!) top, float softcap, float temperature) "
        "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gemstill, CPU, m) { m.impl("block_mass", TORCH_BOX(&block_mass)); }
