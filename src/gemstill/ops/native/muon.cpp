// A step of Muon, its Newton-Schulz rounds in bfloat16 with float sums: a thread works off a whole matrix, whose
// products stay in its caches, and of what is symmetric only the lower half is computed.

#include "common.h"

#ifdef __AVX512BF16__

#include <immintrin.h>

namespace {

constexpr int64_t TILE = 16, HEIGHT = 4, WIDTH = 4;  // a product is made in blocks of HEIGHT rows, WIDTH * TILE columns

inline int64_t padded(int64_t n) { return (n + TILE - 1) / TILE * TILE; }

inline __mmask16 first(int64_t count) { return count >= TILE ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

inline __m512 widened(const uint16_t* at) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16));
}

inline void narrowed(uint16_t* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }

// Of 16 rows of 16 words, the columns.
inline void transpose(__m512i (&x)[TILE]) {
  __m512i y[TILE];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  }
  for (int half = 0; half < 16; half += 8) {
    for (int j = 0; j < 4; j++) {
      y[half + j] = _mm512_shuffle_i32x4(x[half + j], x[half + j + 4], 0x88);
      y[half + j + 4] = _mm512_shuffle_i32x4(x[half + j], x[half + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 4; j++) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
    x[j + 4] = _mm512_shuffle_i32x4(y[j + 4], y[j + 12], 0x88);
    x[j + 12] = _mm512_shuffle_i32x4(y[j + 4], y[j + 12], 0xdd);
  }
}

// HEIGHT rows of a (pairs of numbers) times the columns of V tiles, whose pairs are words: b [pairs, stride].
template <int V, class F>
inline void block(const uint16_t* a, int64_t width, const uint32_t* b, int64_t stride, const F& f) {
  __m512 sum[HEIGHT][V];
  for (auto& row : sum) {
    for (auto& x : row) x = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < width; k += 2, b += stride) {
    __m512bh column[V];
    for (int v = 0; v < V; v++) column[v] = (__m512bh)_mm512_loadu_si512(b + v * TILE);
#pragma GCC unroll 4
    for (int i = 0; i < HEIGHT; i++) {
      int32_t pair;
      std::memcpy(&pair, a + i * width + k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], both, column[v]);
    }
  }
  for (int i = 0; i < HEIGHT; i++) {
    for (int v = 0; v < V; v++) f(i, v, sum[i][v]);
  }
}

// a [rows, width] times b, pairs [width / 2, columns]; f(row, column, sums of 16 columns). lower: only what lies on
// or below the diagonal is asked for.
template <bool lower, class F>
void product(const uint16_t* a, int64_t rows, int64_t width, const uint32_t* b, int64_t columns, const F& f) {
  for (int64_t j = 0; j < columns; j += WIDTH * TILE) {
    for (int64_t i = lower ? j : 0; i < rows; i += HEIGHT) {
      const auto at = [&](int r, int v, __m512 x) { f(i + r, j + v * TILE, x); };
      const uint16_t* some = a + i * width;
      const int64_t tiles = (std::min(columns, lower ? i + HEIGHT : columns) - j + TILE - 1) / TILE;
      if (tiles >= 4) block<4>(some, width, b + j, columns, at);
      else if (tiles == 3) block<3>(some, width, b + j, columns, at);
      else if (tiles == 2) block<2>(some, width, b + j, columns, at);
      else block<1>(some, width, b + j, columns, at);
    }
  }
}

// Rows 2k and 2k + 1 of x [rows, columns] as pairs [rows / 2, columns].
void pair_rows(const uint16_t* x, int64_t rows, int64_t columns, uint32_t* to) {
  for (int64_t i = 0; i < rows; i += 2, x += 2 * columns, to += columns) {
    for (int64_t j = 0; j < columns; j += TILE) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + j)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + columns + j)));
      _mm512_storeu_si512(to + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// Columns 2k and 2k + 1 of x [rows, columns] as pairs [columns / 2, rows].
void pair_columns(const uint16_t* x, int64_t rows, int64_t columns, uint32_t* to) {
  __m512i tile[TILE];
  for (int64_t i = 0; i < rows; i += TILE) {
    for (int64_t j = 0; j < columns; j += 2 * TILE) {
      const __mmask16 there = first((columns - j) / 2);
      for (int r = 0; r < TILE; r++) tile[r] = _mm512_maskz_loadu_epi32(there, x + (i + r) * columns + j);
      transpose(tile);
      const int64_t count = std::min(TILE, (columns - j) / 2);
      for (int64_t r = 0; r < count; r++) _mm512_storeu_si512(to + (j / 2 + r) * rows + i, tile[r]);
    }
  }
}

// What lies above the diagonal of x [n, n], from what lies below.
void mirror(uint16_t* x, int64_t n) {
  __m512i tile[TILE];
  for (int64_t i = 0; i < n; i += TILE) {
    for (int64_t j = 0; j <= i; j += TILE) {
      for (int r = 0; r < TILE; r++) {
        tile[r] = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + (i + r) * n + j)));
      }
      transpose(tile);
      for (int r = 0; r < TILE; r++) {  // of a tile on the diagonal only what is right of it
        const __mmask16 kept = i > j ? 0xffff : 0xffff & ~((1u << (r + 1)) - 1);
        _mm256_mask_storeu_epi16(x + (j + r) * n + i, kept, _mm512_cvtepi32_epi16(tile[r]));
      }
    }
  }
}

// A matrix [rows, columns] in float, as its short side by its long one, padded with zeros.
struct Iterated {
  int64_t rows, columns, R, C;
  bool tall;
  std::vector<uint16_t> x, gram, factor;
  std::vector<uint32_t> pairs;
  std::vector<float> update, lengths;  // of the matrix's rows

  Iterated(int64_t rows_, int64_t columns_)
      : rows(rows_), columns(columns_), R(padded(std::min(rows, columns))), C(padded(std::max(rows, columns))),
        tall(rows > columns), x(R * C), gram(R * R), factor(R * R), pairs(R * C / 2), update(rows * columns),
        lengths(tall ? C : R) {}

  // Each tile of the float matrix, and its place in x: f(where in the matrix, rows and columns there, place in x).
  template <class F>
  void tiles(const F& f) {
    for (int64_t i = 0; i < rows; i += TILE) {
      for (int64_t j = 0; j < columns; j += TILE) {
        f(i * columns + j, std::min(TILE, rows - i), first(columns - j), x.data() + (tall ? j * C + i : i * C + j));
      }
    }
  }

  // The sum of the squares of `count` numbers, f(k) of which are those from k on.
  template <class F>
  static float squares(int64_t count, const F& f) {
    __m512 sum[4] = {};
    for (int64_t k = 0; k < count; k += 4 * TILE) {
      for (int64_t v = 0; v < 4 && k + v * TILE < count; v++) {
        const __m512 y = f(k + v * TILE);
        sum[v] = _mm512_fmadd_ps(y, y, sum[v]);
      }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
  }

  // Nesterov's momentum, one step ahead, and x from it, of norm 1.
  void take(const float* gradient, float* momentum, float beta) {
    const int64_t count = rows * columns;
    const __m512 old = _mm512_set1_ps(beta), fresh = _mm512_set1_ps(1 - beta);
    const float sum = squares(count, [&](int64_t k) {
      const __mmask16 there = first(count - k);
      const __m512 g = _mm512_maskz_loadu_ps(there, gradient + k);
      __m512 m = _mm512_maskz_loadu_ps(there, momentum + k);
      m = _mm512_fmadd_ps(fresh, _mm512_sub_ps(g, m), m);
      _mm512_mask_storeu_ps(momentum + k, there, m);
      const __m512 ahead = _mm512_fmadd_ps(old, _mm512_sub_ps(m, g), g);
      _mm512_mask_storeu_ps(update.data() + k, there, ahead);
      return ahead;
    });
    const __m512 by = _mm512_set1_ps(1 / std::max(std::sqrt(sum), 1e-30f));
    tiles([&](int64_t at, int64_t height, __mmask16 wide, uint16_t* to) {
      __m512i tile[TILE] = {};
      for (int64_t r = 0; r < height; r++) {
        const __m512 part = _mm512_maskz_loadu_ps(wide, update.data() + at + r * columns);
        tile[r] = _mm512_castps_si512(_mm512_mul_ps(part, by));
      }
      if (tall) transpose(tile);
      for (int r = 0; r < TILE; r++) narrowed(to + r * C, _mm512_castsi512_ps(tile[r]));
    });
  }

  // The squared length of each of the matrix's rows.
  void measure() {
    std::fill(lengths.begin(), lengths.end(), 0.0f);
    for (int64_t i = 0; i < R; i++) {
      if (!tall) lengths[i] = squares(C, [&](int64_t k) { return widened(x.data() + i * C + k); });
      for (int64_t k = 0; tall && k < C; k += TILE) {
        const __m512 y = widened(x.data() + i * C + k);
        _mm512_storeu_ps(&lengths[k], _mm512_fmadd_ps(y, y, _mm512_loadu_ps(&lengths[k])));
      }
    }
  }

  // weight = decay weight - step (x, each row of length 1).
  void give(float* weight, float step, float decay) {
    measure();
    tiles([&](int64_t at, int64_t height, __mmask16 wide, const uint16_t* from) {
      __m512i tile[TILE];
      for (int r = 0; r < TILE; r++) tile[r] = _mm512_castps_si512(widened(from + r * C));
      if (tall) transpose(tile);
      for (int64_t r = 0; r < height; r++) {
        float* to = weight + at + r * columns;
        const float by = -step / std::max(std::sqrt(lengths[at / columns + r]), 1e-7f);
        const __m512 kept = _mm512_mul_ps(_mm512_set1_ps(decay), _mm512_maskz_loadu_ps(wide, to));
        _mm512_mask_storeu_ps(to, wide, _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_castsi512_ps(tile[r]), kept));
      }
    });
  }

  // gram becomes x xᵀ.
  void multiply() {
    pair_columns(x.data(), R, C, pairs.data());
    product<true>(x.data(), R, C, pairs.data(), R, [&](int64_t i, int64_t j, __m512 sum) {
      narrowed(gram.data() + i * R + j, sum);
    });
    mirror(gram.data(), R);
  }

  // x and gram as if x had been divided by (the sum of all singular values to the fourth)^(1/4).
  void tighten() {
    const float sum = squares(gram.size(), [&](int64_t k) { return widened(gram.data() + k); });
    const float bound = std::max(std::sqrt(sum), 1e-7f);
    scale(x, 1 / std::sqrt(bound));
    scale(gram, 1 / bound);
  }

  static void scale(std::vector<uint16_t>& all, float by) {
    for (size_t k = 0; k < all.size(); k += TILE) {
      narrowed(all.data() + k, _mm512_mul_ps(_mm512_set1_ps(by), widened(all.data() + k)));
    }
  }

  // x becomes (a + b g + c g²) x, with g = x xᵀ as gram holds it.
  void round(float a, float b, float c) {
    pair_rows(gram.data(), R, R, pairs.data());
    product<true>(gram.data(), R, R, pairs.data(), R, [&](int64_t i, int64_t j, __m512 sum) {
      const __m512 linear = _mm512_mul_ps(_mm512_set1_ps(b), widened(gram.data() + i * R + j));
      narrowed(factor.data() + i * R + j, _mm512_fmadd_ps(_mm512_set1_ps(c), sum, linear));
    });
    mirror(factor.data(), R);
    pair_rows(x.data(), R, C, pairs.data());
    product<false>(factor.data(), R, R, pairs.data(), C, [&](int64_t i, int64_t j, __m512 sum) {
      uint16_t* at = x.data() + i * C + j;
      narrowed(at, _mm512_fmadd_ps(_mm512_set1_ps(a), widened(at), sum));
    });
  }
};

}  // namespace

#endif

namespace {

// Moves matrices of one shape, [rows, columns] float: weight = decay weight - step o, with o the rows, each of length 1,
// of what rounds with coefficients [rounds, 3] double (a, b, c) make of Nesterov's momentum (gemstill.train.optimizer).
// Gives whether this processor has the products for it.
bool muon(std::vector<Tensor> weights, std::vector<Tensor> gradients, std::vector<Tensor> momenta, Tensor coefficients,
          double beta, double step, double decay) {
#ifdef __AVX512BF16__
  const int64_t rows = weights[0].size(0), columns = weights[0].size(1), rounds = coefficients.size(0);
  const double* factors = pointer<double>(coefficients);
  torch::stable::parallel_for(0, weights.size(), 1, [&](int64_t begin, int64_t end) {
    Iterated matrix(rows, columns);
    for (int64_t i = begin; i < end; i++) {
      matrix.take(pointer<float>(gradients[i]), pointer<float>(momenta[i]), float(beta));
      for (int64_t k = 0; k < rounds; k++) {
        matrix.multiply();
        if (k == 0) matrix.tighten();
        matrix.round(float(factors[3 * k]), float(factors[3 * k + 1]), float(factors[3 * k + 2]));
      }
      matrix.give(pointer<float>(weights[i]), float(step), float(decay));
    }
  });
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemstill, m) {
  m.def("muon(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] momenta, Tensor coefficients, float beta, "
        "float step, float decay) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(gemstill, CPU, m) { m.impl("muon", TORCH_BOX(&muon)); }
