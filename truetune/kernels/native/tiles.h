// Tiles of words, and the one product that attention is made of.
//
// A word is 32 bits: one float, or two bf16 that are multiplied and added as a pair (as vdpbf16ps does). A
// product contracts words: C[4, n] += sum over s of A[4, s] B[s, n], with A spread over the lanes and B along
// them. So an operand stands in one of three layouts:
//   rows        [row][column / per word]: A, contracted over its columns
//   transposed  [column / per word][row]: B, contracted over its columns
//   paired      [row / per word][column]: contracted over its rows, as B, or as A with its steps exchanged
// Vectors are those of GCC and clang, as wide as the machine's registers. Nothing else depends on the machine but
// the pairs of bf16, which some multiply in one instruction.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#ifndef TRUETUNE_LIBRARY  // of torch.ops, which the operations belong to
#define TRUETUNE_LIBRARY truetune
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(TRUETUNE_PLAIN)
#include <immintrin.h>
#define TRUETUNE_PAIRS 1
#else
#define TRUETUNE_PAIRS 0
#endif

namespace truetune {

using Index = int64_t;
using Word = uint32_t;

#if defined(TRUETUNE_PLAIN)
constexpr int BYTES = 16, COLUMNS = 2;
#elif defined(__AVX512F__)
constexpr int BYTES = 64, COLUMNS = 4;
#elif defined(__AVX2__)
constexpr int BYTES = 32, COLUMNS = 2;
#else
constexpr int BYTES = 16, COLUMNS = 2;
#endif
// BYTES of a register; COLUMNS: vectors of C in one product, whose ROWS * COLUMNS sums fill half of the registers.

using Vec = float __attribute__((vector_size(BYTES)));
using Words = uint32_t __attribute__((vector_size(BYTES)));
using Ints = int32_t __attribute__((vector_size(BYTES)));

constexpr Index LANES = BYTES / 4;
constexpr Index ROWS = 4;
constexpr Index KEYS = 64;  // of one block: its keys and values stay in the first cache
constexpr Index LARGEST = 256;  // size of a head
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896340736f;

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
inline void store(void* to, const V& value) {
  std::memcpy(to, &value, sizeof value);
}

inline Index up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }
inline Index down(Index n, Index multiple) { return n / multiple * multiple; }

// Memory of one thread, cut into pieces that begin on cache lines and hold whatever was there.
class Arena {
 public:
  explicit Arena(Index bytes) : memory_(static_cast<char*>(::operator new(bytes, LINE))), end_(bytes) {}

  template <class T>
  T* take(Index count) {
    T* piece = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += up(count * sizeof(T), 64);
    if (used_ > end_) throw std::bad_alloc();
    return piece;
  }

  void clear() { used_ = 0; }

 private:
  static constexpr std::align_val_t LINE{64};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, LINE); }
  };
  std::unique_ptr<char, Free> memory_;
  Index used_ = 0, end_;
};

// Words of one number. A dtype is what its tensors hold (Element) and the words it is multiplied in.
struct Singles {
  static constexpr Index PER_WORD = 1;

  static Vec multiply_add(const Vec& sum, Word a, const Words& b) { return sum + bits<float>(a) * bits<Vec>(b); }
  // Columns from `column` on of a row of words.
  static void store_words(Word* row, Index column, const Vec& x) { store(row + column, x); }
  // Two rows in the paired layout, whose rows of words are `width` apart.
  static void store_pair(Word* to, Index width, const Vec& even, const Vec& odd) {
    store(to, even);
    store(to + width, odd);
  }
};

struct Fp32 : Singles {
  using Element = float;
  static constexpr int TERMS = 7;  // of 2^x

  static Word word(const float* from) { return load<Word>(from); }
  static void convert(float* to, const Vec& x) { store(to, x); }
};

#if TRUETUNE_PAIRS
struct Bf16 {
  static constexpr Index PER_WORD = 2;
  static Vec multiply_add(const Vec& sum, Word a, const Words& b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
  static void store_words(Word* row, Index column, const Vec& x) { convert((uint16_t*)row + column, x); }
  static void store_pair(Word* to, Index, const Vec& even, const Vec& odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    store(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static Word word(const uint16_t* from) { return load<Word>(from); }
  static void convert(uint16_t* to, const Vec& x) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &half, sizeof half);
  }
#else
struct Bf16 : Singles {
  static Word word(const uint16_t* from) { return Word(*from) << 16; }
  // To the nearest, ties to even. What is not a number stays so.
  static void convert(uint16_t* to, const Vec& x) {
    using Shorts = uint16_t __attribute__((vector_size(BYTES / 2)));
    const Words word = bits<Words>(x);
    const Words rounded = x == x ? word + 0x7fffu + ((word >> 16) & 1u) : (word | 0x400000u);
    store(to, __builtin_convertvector(rounded >> 16, Shorts));
  }
#endif
  using Element = uint16_t;
  static constexpr int TERMS = 5;
};

struct Operand {
  const Word* words;
  Index row, step;  // words between neighbours
};

// C[4, N LANES] = A B over `steps` words, or C += A B where ADD.
template <class E, int N, bool ADD>
inline void multiply_columns(float* c, Index c_row, Operand a, const Word* b, Index b_row, Index steps) {
  Vec sums[ROWS][N];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sums[i][j] = ADD ? load<Vec>(c + i * c_row + j * LANES) : Vec{};
  for (Index s = 0; s < steps; s++) {
    Words columns[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) columns[j] = load<Words>(b + s * b_row + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      const Word spread = a.words[i * a.row + s * a.step];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sums[i][j] = E::multiply_add(sums[i][j], spread, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) store(c + i * c_row + j * LANES, sums[i][j]);
}

// C[4, columns] = A B, or C += A B where ADD. `columns` is a multiple of LANES.
template <class E, bool ADD, int N = COLUMNS>
inline void multiply(float* c, Index c_row, Operand a, const Word* b, Index b_row, Index steps, Index columns) {
  for (; columns >= N * LANES; columns -= N * LANES, c += N * LANES, b += N * LANES)
    multiply_columns<E, N, ADD>(c, c_row, a, b, b_row, steps);
  if constexpr (N > 1) multiply<E, ADD, N - 1>(c, c_row, a, b, b_row, steps, columns);
}

// 2^x by its Taylor series about the nearest integer, for x up to 127; below 2^-126 it is 0.
template <int TERMS>
inline Vec exp2(const Vec& x) {
  constexpr auto TAYLOR = [] {
    std::array<float, TERMS + 1> terms{};
    double term = 1;
    for (int n = 0; n <= TERMS; n++, term *= 0.693147180559945309417 / n) terms[n] = static_cast<float>(term);
    return terms;
  }();
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: a float of that size has no fraction
  const Vec shifted = x + ROUND;
  const Vec fraction = x - (shifted - ROUND);
  Vec sum = TAYLOR[TERMS] - Vec{};
#pragma GCC unroll 8
  for (int n = TERMS - 1; n >= 0; n--) sum = sum * fraction + TAYLOR[n];
  const Vec power = bits<Vec>((bits<Words>(shifted) + 127u) << 23);
  return x < -126.0f ? Vec{} : sum * power;
}

inline Vec tanh(const Vec& x) {
  const Vec square = x * x;
  const Vec small = x + x * square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835
      + square * (-1382.0f / 155925 + square * (21844.0f / 6081075))))));
  const Vec size = x < 0.0f ? -x : x;
  const Vec large = 1.0f - 2.0f / (exp2<7>((size < 20.0f ? size : 20.0f - Vec{}) * (2 * LOG2E)) + 1.0f);
  const Vec either = size < 0.5f ? small : (x < 0.0f ? -large : large);
  return x == x ? either : x;
}

// The lanes of x, moved round by `by`.
template <class V, Index... I>
inline V turned(const V& x, Index by, std::integer_sequence<Index, I...>) {
  const Ints from{static_cast<int32_t>((I + by) % LANES)...};
#if defined(__clang__)
  V to{};
  for (Index i = 0; i < LANES; i++) to[i] = x[from[i]];
  return to;
#else
  return __builtin_shuffle(x, from);
#endif
}

// All lanes combined, by halves, in every lane.
template <class V, class Combine>
inline V across(V x, Combine combine) {
#pragma GCC unroll 8
  for (Index half = LANES / 2; half > 0; half /= 2)
    x = combine(x, turned(x, half, std::make_integer_sequence<Index, LANES>()));
  return x;
}

inline Vec highest_everywhere(const Vec& x) {
  return across(x, [](const Vec& a, const Vec& b) { return a > b ? a : b; });
}

inline float highest(const Vec& x) { return highest_everywhere(x)[0]; }

inline float total(const Vec& x) {
  return across(x, [](const Vec& a, const Vec& b) { return a + b; })[0];
}

// The three layouts of `rows` rows of `n` elements that lie `stride` apart; rows up to `padded` become zeros.
template <class E>
inline void pack_rows(Word* to, const typename E::Element* from, Index stride, Index rows, Index padded, Index n) {
  const Index words = n / E::PER_WORD;
  for (Index i = 0; i < rows; i++)
    for (Index w = 0; w < words; w++) to[i * words + w] = E::word(from + i * stride + w * E::PER_WORD);
  std::fill(to + rows * words, to + padded * words, 0);
}

// Padded to a whole block of keys.
template <class E>
inline void pack_transposed(Word* to, const typename E::Element* from, Index stride, Index rows, Index n) {
  for (Index w = 0; w < n / E::PER_WORD; w++, to += KEYS) {
    for (Index i = 0; i < rows; i++) to[i] = E::word(from + i * stride + w * E::PER_WORD);
    std::fill(to + rows, to + KEYS, 0);
  }
}

// Columns are padded to whole vectors, too.
template <class E>
inline void pack_paired(Word* to, const typename E::Element* from, Index stride, Index rows, Index padded, Index n) {
  const Index width = up(n, LANES);
  std::fill(to, to + padded / E::PER_WORD * width, 0);
  for (Index i = 0; i < rows; i++, from += stride) {
    Word* row = to + i / E::PER_WORD * width;
    if constexpr (E::PER_WORD == 1)
      for (Index c = 0; c < n; c++) row[c] = E::word(from + c);
    else
      for (Index c = 0; c < n; c++) row[c] |= Word(from[c]) << i % 2 * 16;
  }
}

// n elements, a multiple of 8: factor * from.
template <class E>
inline void store_row(typename E::Element* to, const float* from, float factor, Index n) {
  for (Index i = 0; i < n; i += LANES) {
    typename E::Element converted[LANES];
    E::convert(converted, load<Vec>(from + i) * factor);
    std::memcpy(to + i, converted, std::min(LANES, n - i) * sizeof(typename E::Element));
  }
}

}  // namespace truetune
