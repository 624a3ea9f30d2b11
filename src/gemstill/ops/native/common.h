// What the native kernels share: dtypes, threads, and exponentials that vectorize.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using torch::stable::Tensor;

struct bfloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(int8_t x) { return float(x); }
inline float load(bfloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

inline void store(float& to, float x) { to = x; }
inline void store(bfloat16& to, float x) {  // to nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// Threads share rows in fixed lots, so that no sum depends on how many threads there are.
template <class F>
void over(int64_t rows, int64_t elements_a_row, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_a_row));
  torch::stable::parallel_for(0, rows, grain, f);
}

template <class F>
void by_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == torch::headeronly::ScalarType::Float) {
    f(float{});
  } else {
    STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::BFloat16, "float32 or bfloat16 expected");
    f(bfloat16{});
  }
}

// How exact: float results to some 2e-7, bfloat16 ones, which keep 8 bits, to 3e-6.
template <class T>
constexpr bool exact = std::is_same_v<T, float>;

// e^x for x in [-87, 88]: 2^n by the bits of the exponent, times a series for the rest. Not a number stays that.
template <bool precise>
inline float exponential(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
  const float n = shifted - 12582912.0f;
  float p;
  if constexpr (precise) {
    const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    p = 1.382942059e-3f;
    p = p * f + 8.374771520e-3f;
    p = p * f + 4.166835803e-2f;
    p = p * f + 1.666642083e-1f;
    p = p * f + 4.999999149e-1f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
  } else {
    const float f = x * 1.44269504f - n;  // of 2^f, least squares of the relative error on [-1/2, 1/2]
    p = 9.560510206e-3f;
    p = p * f + 5.591703917e-2f;
    p = p * f + 2.402498111e-1f;
    p = p * f + 6.931219677e-1f;
    p = p * f + 9.999991909e-1f;
  }
  const uint32_t power = (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u;
  return p * __builtin_bit_cast(float, power);
}

inline float within(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): times x, the tanh form of gelu.
template <bool precise>
inline float sigmoid_of(float x) {
  const float u = x * (-1.5957691216f - 0.0713548163f * x * x);
  return 1.0f / (1.0f + exponential<precise>(within(u, -87.0f, 88.0f)));
}

struct Cap {  // z = c tanh(x/c) / t and dz/dx; without a cap, z = x / t
  float cap, twice_inverse, scale;
  explicit Cap(double c, double t = 1.0)
      : cap(float(c / t)), twice_inverse(c > 0 ? float(2 / c) : 0.0f), scale(float(1 / t)) {}
  bool bounded() const { return cap > 0 && cap <= 60; }
};

template <bool capped, bool precise>
inline float value(float x, const Cap& cap, float& slope) {
  if constexpr (!capped) {
    slope = cap.scale;
    return x * cap.scale;
  } else {
    const float u = within(x * cap.twice_inverse, -40.0f, 40.0f);  // 2x/c
    const float e = exponential<precise>(u), r = 1.0f / (e + 1.0f);
    slope = 4.0f * e * r * r * cap.scale;
    const float t = 1.0f - 2.0f * r;
    if constexpr (!precise) return cap.cap * t;
    // 1 - 2r loses the digits of small x; there the series has them.
    const float y = 0.5f * u, s = y * y;
    const float series = y * (1.0f + s * (-0.33333333f + s * (0.13333333f + s * (-0.05396825f + s * 0.02186949f))));
    return cap.cap * (s < 0.0625f ? series : t);
  }
}

// e^(z - top), with z - top <= 0 where `top` was taken out; a capped z needs neither that nor a bound.
template <bool bounded, bool precise>
inline float power(float z) {
  return exponential<precise>(bounded ? z : within(z, -87.0f, 88.0f));
}

template <class T>
float largest(const T* x, int64_t count, float top) {
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < count; j++) top = std::max(top, load(x[j]));
  return top;
}

}  // namespace
