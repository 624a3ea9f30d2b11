// Weight matrices as products with a few vectors read them, and those products. Callable from within a
// parallel_for: a call computes some rows of one product in the thread that it is made in.

#pragma once

#include <cstdint>
#include <new>
#include <vector>

namespace gemstill {

// How the weights of a matrix [N, K] lie in memory, numbered as in ops/packed.py. The first two are rows as any
// tensor has them. The others are panels of 16 rows, in blocks of 32 along K, of unsigned integers q:
//   int8   q - 128 times a half-precision scale for each block
//   int4   q - 8, the same
//   q4_k   s d q - t m: bytes s and t for each block, half-precision d and m for eight
//   q5_k   the same, of bytes
//   q6_k   s d (q - 32): a signed byte s for 16 weights, half-precision d for 256
// For a panel and a block there are 8 (int4, q4_k: 4) lots of 64 bytes: of each of 16 rows 4 bytes, that is weights
// 4j, …, 4j + 3 in lot j; nibbles: 8j, …, 8j + 3 in the low halves, 8j + 4, …, 8j + 7 in the high halves. After all
// panels' integers, from the next multiple of 64 bytes on, come all panels' scales:
//   int8, int4   16 scales for each block
//   q4_k, q5_k   for each 8 blocks 16 d, 16 m, and 8 times 16 s, 16 t
//   q6_k         for each 8 blocks 16 d, and 16 times 16 s
enum class Kind : int64_t { float32, bfloat16, int8, int4, q4_k, q5_k, q6_k };

constexpr int64_t PANEL = 16, BLOCK = 32;

inline bool is_plain(Kind kind) { return kind == Kind::float32 || kind == Kind::bfloat16; }

struct Matrix {
  Kind kind;
  const uint8_t* data;  // fastest where a multiple of 64 bytes
  int64_t N, K;         // K a multiple of 32 unless plain, of 256 for q4_k, q5_k and q6_k
};

// Memory at the beginning of a line, so that no whole vector lies in two.
template <class T>
struct Lines {
  using value_type = T;
  static constexpr std::align_val_t line{64};

  Lines() = default;
  template <class U>
  Lines(const Lines<U>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), line)); }
  void deallocate(T* at, std::size_t) { ::operator delete(at, line); }
  bool operator==(const Lines&) const = default;
};

// M vectors of K numbers as products take them; made anew for other vectors without allocating again.
//
// For packed matrices: in each block of 32 integers of 15 bits, 128 high + low, and their scale. 8 bits alone would
// cost a small model half a percent of its perplexity.
class Activations {
 public:
  // Makes room for M vectors for a product with matrices of this kind, any packed one standing for all of them. Those
  // from `exact` on may be rounded to bfloat16 for bfloat16 weights, where the processor multiplies that.
  void resize(Kind kind, int64_t M, int64_t K, int64_t exact);
  // Takes vectors [begin, end) of x [M, K]; different ones may be taken in different threads. One that is not finite
  // makes products that are not finite.
  void take(const float* x, int64_t begin, int64_t end);

  int64_t M = 0, K = 0, width = 0, blocks = 0;  // width: K rounded up to whole blocks
  int64_t exact = 0;  // vectors that are not rounded: the first
  Kind kind = Kind::float32;
  // [exact, width]. Plain ones: floats, zeros from K on; for bfloat16 weights those at even places of each 32 come first.
  std::vector<float, Lines<float>> values;
  std::vector<uint16_t, Lines<uint16_t>> rounded;  // [M - exact, width], zeros from K on
  std::vector<int8_t> high, low;
  std::vector<int16_t> whole;  // 128 high + low; of each 8 those at even places come first
  std::vector<float> scales, totals;          // [M, blocks]: of a block; the scale times the integers' sum
  std::vector<int32_t> sums, halves;  // [M, blocks], [M, 2 blocks]: less the integers' sum, in 32 and in 16
};

// One call for both: `to` becomes x [M, K] as products with `kind` take it.
inline void quantize_activations(const float* x, Kind kind, int64_t M, int64_t K, Activations& to) {
  to.resize(kind, M, K, M);
  to.take(x, 0, M);
}

// What a thread reads after some rows of a matrix: its rows up to `stop`, then what lies from `next` on. Without `next`,
// what follows in the matrix.
struct Ahead {
  int64_t stop = 0;
  const uint8_t* next = nullptr;
};

// out[m * stride + n - begin] = the product of row n and vector m, for begin <= n < end and all M. `begin` is a
// multiple of 16, and so is `end` unless it is N. The same sums whatever M, begin and end are.
void multiply(const Matrix& weights, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
              const Ahead& ahead = {});

// Where the weights of a row lie that begins a panel.
const uint8_t* weights_from(const Matrix& weights, int64_t row);

// Weights [begin, end) as floats, row by row: out [end - begin, K].
void unpack_rows(const Matrix& weights, int64_t begin, int64_t end, float* out);

}  // namespace gemstill
