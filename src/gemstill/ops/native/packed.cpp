// Products of weight matrices with a few vectors: what every kind of matrix and instruction set shares, and the
// operations of ops/packed.py.

#include "packed.h"

#include "common.h"
#include "packed_layout.h"
#include "packed_rows.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "packed_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "packed_avx2.h"
#else
#include "packed_plain.h"
#endif

namespace gemstill {

void Activations::resize(Kind to, int64_t vectors, int64_t numbers, int64_t first) {
  kind = to;
  M = vectors;
  exact = ROUNDS && kind == Kind::bfloat16 ? first : M;
  K = numbers;
  blocks = (K + BLOCK - 1) / BLOCK;
  width = blocks * BLOCK;
  if (is_plain(kind)) {
    values.resize(exact * width);
    rounded.resize((M - exact) * width);
    return;
  }
  STD_TORCH_CHECK(K % BLOCK == 0, "a row is no whole number of blocks");
  high.resize(M * width);
  low.resize(M * width);
  whole.resize(M * width);
  scales.resize(M * blocks);
  totals.resize(M * blocks);
  sums.resize(M * blocks);
  halves.resize(M * blocks * 2);
}

namespace {

constexpr float MOST = 127 * 128;

// A block's integers, and less their sums; gives its scale.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
float take_block(const float* x, int8_t* high, int8_t* low, int16_t* whole, int32_t* halves) {
  // As integers, magnitudes have the order of the numbers, and what is not finite is largest.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  const __m512i bits = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                                        _mm512_and_si512(_mm512_castps_si512(b), magnitude));
  const uint32_t top = _mm512_reduce_max_epu32(bits);
  const bool sound = top < 0x7f800000u;
  const float most = __builtin_bit_cast(float, top);
  const __m512 by = _mm512_set1_ps(sound && most > 1e-30f ? MOST / most : 0.0f);
  // 0, 2, 4, 6, 1, 3, 5, 7 of each 8 words
  const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  for (int part = 0; part < 2; part++) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(part ? b : a, by));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
    const __m512i lower = _mm512_sub_epi32(q, _mm512_slli_epi32(upper, 7));
    _mm_storeu_si128((__m128i*)(high + 16 * part), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128((__m128i*)(low + 16 * part), _mm512_cvtepi32_epi8(lower));
    _mm256_storeu_si256((__m256i*)(whole + 16 * part), _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(q), apart));
    halves[part] = -_mm512_reduce_add_epi32(q);
  }
  return sound ? most / MOST : std::numeric_limits<float>::quiet_NaN();
}
#else
float take_block(const float* x, int8_t* high, int8_t* low, int16_t* whole, int32_t* halves) {
  float top = 0.0f, finite = 0.0f;
#pragma omp simd reduction(max : top) reduction(+ : finite)
  for (int64_t k = 0; k < BLOCK; k++) {
    top = std::max(top, std::fabs(x[k]));
    finite += x[k] * 0.0f;
  }
  const bool sound = finite == 0.0f;
  const float by = sound && top > 1e-30f ? MOST / top : 0.0f;
  for (int part = 0; part < 2; part++) {
    int32_t sum = 0;
    int16_t both[BLOCK];
#pragma omp simd reduction(+ : sum)
    for (int64_t k = part * BLOCK / 2; k < (part + 1) * BLOCK / 2; k++) {
      const float shifted = (sound ? x[k] * by : 0.0f) + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
      const int32_t q = __builtin_bit_cast(int32_t, shifted) - 0x4b400000;
      both[k] = int16_t(q);
      high[k] = int8_t((q + 64) >> 7);
      low[k] = int8_t(q - ((q + 64) >> 7) * 128);
      sum += q;
    }
    for (int64_t k = part * BLOCK / 2; k < (part + 1) * BLOCK / 2; k += 8) {
      for (int64_t i = 0; i < 4; i++) {
        whole[k + i] = both[k + 2 * i];
        whole[k + 4 + i] = both[k + 2 * i + 1];
      }
    }
    halves[part] = -sum;
  }
  return sound ? top / MOST : std::numeric_limits<float>::quiet_NaN();
}
#endif

}  // namespace

namespace {

// A vector of K floats in `to`; for bfloat16 weights, of each 32 those at even places come first.
void take_floats(const float* from, Kind kind, int64_t K, float* to) {
  if (kind == Kind::float32) {
    std::copy(from, from + K, to);
    return;
  }
  for (int64_t b = 0; b < K / BLOCK; b++) {
    for (int64_t k = 0; k < BLOCK / 2; k++) {
      to[b * BLOCK + k] = from[b * BLOCK + 2 * k];
      to[b * BLOCK + BLOCK / 2 + k] = from[b * BLOCK + 2 * k + 1];
    }
  }
  for (int64_t k = K / BLOCK * BLOCK; k < K; k++) to[k / BLOCK * BLOCK + k % 2 * (BLOCK / 2) + k % BLOCK / 2] = from[k];
}

void take_rounded(const float* from, int64_t K, uint16_t* to) {
#pragma omp simd
  for (int64_t k = 0; k < K; k++) {
    bfloat16 near;
    store(near, from[k]);
    to[k] = near.bits;
  }
}

}  // namespace

void Activations::take(const float* x, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; m++) {
    const float* from = x + m * K;
    if (m >= exact) {
      uint16_t* to = rounded.data() + (m - exact) * width;
      take_rounded(from, K, to);
      std::fill(to + K, to + width, 0);
      continue;
    }
    if (is_plain(kind)) {
      float* to = values.data() + m * width;
      std::fill(to + K, to + width, 0.0f);
      take_floats(from, kind, K, to);
      continue;
    }
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t i = m * blocks + b, at = m * width + b * BLOCK;
      scales[i] = take_block(from + b * BLOCK, &high[at], &low[at], &whole[at], &halves[2 * i]);
      sums[i] = halves[2 * i] + halves[2 * i + 1];
      totals[i] = scales[i] * float(-sums[i]);
    }
  }
}

namespace {

using Multiply = void (*)(const Panel&, const Activations&, int64_t, float*);

template <Kind kind, int M>
void fill_products(Multiply* table) {
  table[M] = multiply_panel<kind, M>;
  if constexpr (M > 1) fill_products<kind, M - 1>(table);
}

template <Kind kind>
void multiply_packed(const Matrix& weights, const Activations& x, int64_t begin, int64_t end, float* out,
                     int64_t stride, const Ahead& ahead) {
  Multiply products[VECTORS + 1];
  fill_products<kind, VECTORS>(products);
  const int64_t tiles = (x.M + VECTORS - 1) / VECTORS, later = x.M == 1 ? distance<kind, 1> : distance<kind, VECTORS>;
  const uint8_t* stop = panel_of<kind>(weights, (ahead.stop + PANEL - 1) / PANEL).integers;
  alignas(64) float sums[VECTORS * PANEL];
  for (int64_t row = begin; row < end; row += PANEL) {
    Panel panel = panel_of<kind>(weights, row / PANEL);
    const int64_t rows = std::min(PANEL, end - row);
    panel.ahead = panel.integers + later;
    if (ahead.next && panel.ahead >= stop) panel.ahead = ahead.next + (panel.ahead - stop);
    for (int64_t tile = 0; tile < tiles; tile++) {  // of about the same size each
      const int64_t first = x.M * tile / tiles, count = x.M * (tile + 1) / tiles - first;
      products[count](panel, x, first, sums);
      panel.ahead = panel.integers;  // asked for once: these are at hand
      for (int64_t m = 0; m < count; m++) {
        std::copy(sums + m * PANEL, sums + m * PANEL + rows, out + (first + m) * stride + row - begin);
      }
    }
  }
}

template <class T>
void multiply_plain(const Matrix& weights, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
                    const Ahead& ahead) {
  const T* data = reinterpret_cast<const T*>(weights.data);
  const T* next = ahead.next && end >= ahead.stop ? reinterpret_cast<const T*>(ahead.next) : data + end * x.K;
  multiply_rows(data + begin * x.K, x, end - begin, next, out, stride);
}

// Bytes 4j, …, 4j + 3 of each lot j belong to one row: q[r - first] = its integers in block b, for first <= r < last.
template <Kind kind>
void integers_of(const Panel& panel, int64_t b, int first, int last, uint8_t (*q)[BLOCK]) {
  const uint8_t* block = panel.integers + b * integer_bytes<kind>;
  for (int r = first; r < last; r++) {
    uint8_t* to = q[r - first];
    if constexpr (!in_nibbles<kind>) {
      for (int j = 0; j < 8; j++) std::memcpy(to + 4 * j, block + 64 * j + 4 * r, 4);
      continue;
    }
    for (int j = 0; j < 4; j++) {
      uint32_t both;
      std::memcpy(&both, block + 64 * j + 4 * r, 4);
      const uint32_t low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
      std::memcpy(to + 8 * j, &low, 4);
      std::memcpy(to + 8 * j + 4, &high, 4);
    }
  }
}

// Rows [first, last) of a panel, one after the other: out [last - first, blocks 32].
template <Kind kind, class T>
void unpack_panel(const Panel& panel, int64_t blocks, int first, int last, T* out) {
  constexpr int parts = kind == Kind::q6_k ? 2 : 1, size = BLOCK / parts;
  constexpr float offset = offset_bits<kind> ? 1 << offset_bits<kind> : 0;
  uint8_t q[PANEL][BLOCK];
  for (int64_t b = 0; b < blocks; b++) {
    integers_of<kind>(panel, b, first, last, q);
    for (int r = first; r < last; r++) {
      T* to = out + (r - first) * blocks * BLOCK + b * BLOCK;
      for (int part = 0; part < parts; part++) {
        const Affine affine = affine_at<kind>(panel, b, part, r);
#pragma omp simd
        for (int k = part * size; k < (part + 1) * size; k++) {
          const float wide = (float(q[r - first][k]) - offset) * affine.scale;
          store(to[k], has_least<kind> ? wide - affine.least : wide);
        }
      }
    }
  }
}

template <Kind kind, class T>
void unpack_packed(const Matrix& weights, int64_t begin, int64_t end, T* out) {
  for (int64_t row = begin; row < end;) {
    const int64_t number = row / PANEL, stop = std::min(end, (number + 1) * PANEL), start = number * PANEL;
    unpack_panel<kind>(panel_of<kind>(weights, number), weights.K / BLOCK, int(row - start), int(stop - start), out);
    out += (stop - row) * weights.K;
    row = stop;
  }
}

// f(std::integral_constant<Kind, …>) for the kind of a packed matrix.
template <class F>
void by_kind(Kind kind, const F& f) {
  switch (kind) {
    case Kind::int8: return f(std::integral_constant<Kind, Kind::int8>{});
    case Kind::int4: return f(std::integral_constant<Kind, Kind::int4>{});
    case Kind::q4_k: return f(std::integral_constant<Kind, Kind::q4_k>{});
    case Kind::q5_k: return f(std::integral_constant<Kind, Kind::q5_k>{});
    case Kind::q6_k: return f(std::integral_constant<Kind, Kind::q6_k>{});
    default: STD_TORCH_CHECK(false, "no packed matrix");
  }
}

}  // namespace

void multiply(const Matrix& weights, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
              const Ahead& ahead) {
  STD_TORCH_CHECK(x.K == weights.K, "the vectors have another length than the matrix's rows");
  STD_TORCH_CHECK(is_plain(weights.kind) ? x.kind == weights.kind : !is_plain(x.kind), "vectors of another kind");
  if (weights.kind == Kind::float32) {
    multiply_plain<float>(weights, x, begin, end, out, stride, ahead);
  } else if (weights.kind == Kind::bfloat16) {
    multiply_plain<uint16_t>(weights, x, begin, end, out, stride, ahead);
  } else {
    by_kind(weights.kind, [&](auto kind) { multiply_packed<kind()>(weights, x, begin, end, out, stride, ahead); });
  }
}

const uint8_t* weights_from(const Matrix& weights, int64_t row) {
  if (is_plain(weights.kind)) return weights.data + row * weights.K * (weights.kind == Kind::float32 ? 4 : 2);
  const uint8_t* found = nullptr;
  by_kind(weights.kind, [&](auto kind) { found = panel_of<kind()>(weights, row / PANEL).integers; });
  return found;
}

void unpack_rows(const Matrix& weights, int64_t begin, int64_t end, float* out) {
  by_kind(weights.kind, [&](auto kind) { unpack_packed<kind()>(weights, begin, end, out); });
}

}  // namespace gemstill

namespace {

using namespace gemstill;

// x [M, K] times each matrix of `weights`, as (kind, N), side by side: out [M, sum of N]. float32 or bfloat16 both;
// a matrix of kind float32 or bfloat16 is a contiguous tensor, any other Packed.data.
void packed_linear(Tensor x, std::vector<Tensor> weights, std::vector<int64_t> kinds, std::vector<int64_t> sizes,
                   Tensor out) {
  const int64_t M = x.size(0), K = x.size(1), width = out.size(1), grain = 8;
  std::vector<Matrix> matrices;
  std::vector<int64_t> starts{0}, columns{0};  // in panels of all matrices, and in columns of `out`
  for (size_t i = 0; i < weights.size(); i++) {
    matrices.push_back({Kind(kinds[i]), pointer<uint8_t>(weights[i]), sizes[i], K});
    starts.push_back(starts.back() + (sizes[i] + PANEL - 1) / PANEL);
    columns.push_back(columns.back() + sizes[i]);
    STD_TORCH_CHECK(matrices[i].kind == matrices[0].kind || !is_plain(matrices[0].kind), "plain and packed matrices");
  }
  by_dtype(x, [&](auto type) {
    using T = decltype(type);
    std::vector<float> wide;
    const float* from = nullptr;
    if constexpr (exact<T>) {
      from = pointer<float>(x);
    } else {
      wide.resize(M * K);
      for (int64_t i = 0; i < M * K; i++) wide[i] = load(pointer<T>(x)[i]);
      from = wide.data();
    }
    Activations by;
    quantize_activations(from, matrices[0].kind, M, K, by);
    torch::stable::parallel_for(0, starts.back(), grain, [&](int64_t begin, int64_t end) {
      std::vector<float> made(M * grain * PANEL);
      size_t i = 0;
      for (int64_t at = begin, stop = 0; at < end; at = stop) {
        while (at >= starts[i + 1]) i++;
        stop = std::min({end, at + grain, starts[i + 1]});
        const int64_t row = (at - starts[i]) * PANEL, last = std::min((stop - starts[i]) * PANEL, sizes[i]);
        multiply(matrices[i], by, row, last, made.data(), grain * PANEL);
        for (int64_t m = 0; m < M; m++) {
          T* to = pointer<T>(out) + m * width + columns[i] + row;
          for (int64_t j = 0; j < last - row; j++) store(to[j], made[m * grain * PANEL + j]);
        }
      }
    });
  });
}

// Rows of a packed matrix [N, K]: those that ids [n] int64 name, or `count` from `start` on where there are no ids;
// out [n or count, K] float32 or bfloat16.
void packed_rows(Tensor data, int64_t kind, int64_t N, Tensor ids, int64_t start, Tensor out) {
  const int64_t K = out.size(1), count = out.size(0);
  const int64_t* id = ids.numel() ? pointer<int64_t>(ids) : nullptr;
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = id ? id[i] : start + i;
    STD_TORCH_CHECK(row >= 0 && row < N, "a row outside the matrix");
  }
  const Matrix matrix{Kind(kind), pointer<uint8_t>(data), N, K};
  by_dtype(out, [&](auto type) {
    using T = decltype(type);
    by_kind(matrix.kind, [&](auto kind) {
      const int64_t lot = id ? 1 : PANEL;  // rows that lie together are faster together
      over((count + lot - 1) / lot, lot * K, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * lot; i < std::min(count, end * lot); i += lot) {
          const int64_t row = id ? id[i] : start + i, rows = std::min(lot, count - i);
          unpack_packed<kind()>(matrix, row, row + rows, pointer<T>(out) + i * K);
        }
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemstill, m) {
  m.def("packed_linear(Tensor x, Tensor[] weights, int[] kinds, int[] sizes, Tensor(a!) out) -> ()");
  m.def("packed_rows(Tensor data, int kind, int N, Tensor ids, int start, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gemstill, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_rows", TORCH_BOX(&packed_rows));
}
