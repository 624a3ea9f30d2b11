// Where in a packed matrix a panel's integers and scales lie, and what they mean (see packed.h).

#pragma once

#include <algorithm>
#include <cstring>

#include "packed.h"

namespace gemstill {

// Bytes ahead of those being multiplied that are asked for, since processors stop at a page's end.
constexpr int64_t AHEAD = 4096, LATER = 16384;

template <Kind kind>
constexpr bool in_nibbles = kind == Kind::int4 || kind == Kind::q4_k;
template <Kind kind>
constexpr bool in_eights = kind == Kind::q4_k || kind == Kind::q5_k || kind == Kind::q6_k;  // blocks share a scale
template <Kind kind>
constexpr bool has_least = kind == Kind::q4_k || kind == Kind::q5_k;
template <Kind kind>
constexpr int offset_bits = kind == Kind::int8 ? 7 : kind == Kind::int4 ? 3 : kind == Kind::q6_k ? 5 : 0;

struct Panel {
  const uint8_t *integers, *scales;
  const uint8_t* ahead = nullptr;  // what is asked for meanwhile, as many bytes as there are integers
};

template <Kind kind>
constexpr int64_t integer_bytes = in_nibbles<kind> ? 256 : 512;  // of a panel and a block
template <Kind kind>
constexpr int64_t scale_bytes = has_least<kind> ? 320 : in_eights<kind> ? 288 : 32;  // of a panel and 1 or 8 blocks

template <Kind kind>
Panel panel_of(const Matrix& weights, int64_t number) {
  const int64_t panels = (weights.N + PANEL - 1) / PANEL, blocks = weights.K / BLOCK;
  const int64_t groups = in_eights<kind> ? blocks / 8 : blocks, all = panels * blocks * integer_bytes<kind>;
  const uint8_t* scales = weights.data + (all + 63) / 64 * 64;
  return {weights.data + number * blocks * integer_bytes<kind>, scales + number * groups * scale_bytes<kind>};
}

inline float half(const uint8_t* at) {
  _Float16 x;
  std::memcpy(&x, at, 2);
  return float(x);
}

struct Affine {  // a weight is scale * (q - offset) - least
  float scale, least;
};

// Of row r of a panel in block b, or half of it.
template <Kind kind>
Affine affine_at(const Panel& panel, int64_t b, int part, int r) {
  if constexpr (!in_eights<kind>) return {half(panel.scales + b * 32 + 2 * r), 0.0f};
  const uint8_t* group = panel.scales + b / 8 * scale_bytes<kind>;
  if constexpr (has_least<kind>) {
    const uint8_t* own = group + 64 + b % 8 * 32;
    return {half(group + 2 * r) * float(own[r]), half(group + 32 + 2 * r) * float(own[16 + r])};
  }
  return {half(group + 2 * r) * float(int8_t(group[32 + (b % 8 * 2 + part) * 16 + r])), 0.0f};
}

// The unsigned integer of weight k in block b of row r.
template <Kind kind>
int32_t integer_at(const Panel& panel, int64_t b, int r, int k) {
  const uint8_t* block = panel.integers + b * integer_bytes<kind>;
  if constexpr (!in_nibbles<kind>) return block[k / 4 * 64 + r * 4 + k % 4];
  const uint8_t both = block[k / 8 * 64 + r * 4 + k % 4];
  return k % 8 < 4 ? both & 15 : both >> 4;
}

}  // namespace gemstill
