// Matrices of bf16 or fp32 laid out as words of bf16, whichever way they lie.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "reading.h"

namespace truetune {
namespace {

constexpr int VECTORS = 4;  // of rows in one panel
constexpr Index PANEL = VECTORS * LANES;

// A matrix [rows, columns], contracted over its columns, one of whose strides is 1.
struct Matrix {
  void* at;
  bool single;
  Index rows, columns, row, column;

  explicit Matrix(const at::Tensor& t)
      : at(t.data_ptr()), single(t.scalar_type() == at::kFloat), rows(t.size(0)), columns(t.size(1)),
        row(t.stride(0)), column(t.stride(1)) {
    TORCH_CHECK(single || t.scalar_type() == at::kBFloat16, "matrices have to be float or bfloat16");
    if (columns == 1) column = 1;
    if (rows == 1 && column != 1) row = 1;
    TORCH_CHECK(row == 1 || column == 1, "rows or columns have to lie side by side");
  }

  template <class T>
  T* place(Index i, Index j) const {
    return static_cast<T*>(at) + i * row + j * column;
  }
};

inline Index words_of(Index columns) { return up(columns, 2) / Bf16::PER_WORD; }

// LANES rows or words of a matrix.
using Square = std::array<Words, LANES>;
constexpr Index SPAN = LANES * Bf16::PER_WORD;  // columns of a square

#if TRUETUNE_PAIRS
inline __mmask32 lanes(Index left) {
  return left >= 32 ? ~__mmask32{} : (__mmask32{1} << std::max<Index>(left, 0)) - 1;
}

inline __m512i shorts(const uint16_t* from, Index left) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(left), from));
}
inline __m512i shorts(const float* from, Index left) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes(left), from)));
}

// LANES words of one row, up to `left` elements; and of one word LANES rows, up to `rows` and the last column.
inline Words row_words(const uint16_t* from, Index left) {
  return (Words)_mm512_maskz_loadu_epi16(lanes(left), from);
}
inline Words row_words(const float* from, Index left) {
  const __m512 low = _mm512_maskz_loadu_ps(lanes(left), from);
  return (Words)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(lanes(left - 16), from + 16), low);
}
template <class T>
inline Words column_words(const T* from, Index stride, Index rows, Index columns) {
  const __m512i even = shorts(from, columns > 0 ? rows : 0), odd = shorts(from + stride, columns > 1 ? rows : 0);
  return (Words)_mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

// Rows and columns exchanged, first in fours, then fours of fours.
inline void exchange(Square& square) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) x[i] = (__m512i)square[i];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    square[j] = (Words)_mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    square[j + 8] = (Words)_mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}
#else
template <class T>
inline Words row_words(const T* from, Index left) {
  if (left <= 0) return Words{};
  uint16_t half[LANES];
  Bf16::convert(half, read(from, left));
  return bits<Words>(read(half, LANES));
}
template <class T>
inline Words column_words(const T* from, Index, Index rows, Index columns) {
  return row_words(from, columns > 0 ? rows : 0);
}
inline void exchange(Square& square) {
  for (Index i = 0; i < LANES; i++)
    for (Index j = 0; j < i; j++) std::swap(square[i][j], square[j][i]);
}
#endif

// Of a matrix the LANES rows from `row` on and SPAN columns from `column` on, as rows of words, or as words of rows;
// what is missing is 0.
template <class T>
inline Square square_as(const Matrix& m, Index row, Index column, bool by_rows) {
  const T* from = m.place<const T>(row, column);
  const Index rows = m.rows - row, columns = m.columns - column;
  Square square;
#pragma GCC unroll 16
  for (Index i = 0; i < LANES; i++) {
    const Index k = i * Bf16::PER_WORD;
    square[i] = m.column == 1 ? row_words(from + i * m.row, i < rows ? columns : 0)
                              : column_words(from + k * m.column, m.column, rows, columns - k);
  }
  if (by_rows != (m.column == 1)) exchange(square);
  return square;
}

inline Square square_of(const Matrix& m, Index row, Index column, bool by_rows) {
  return m.single ? square_as<float>(m, row, column, by_rows) : square_as<uint16_t>(m, row, column, by_rows);
}

// The panel of rows from `first` on, columns from `begin` to `end`: [word][row].
[[gnu::noinline]] inline void lay_panel(Word* to, const Matrix& m, Index first, Index begin, Index end) {
  for (Index k = begin; k < end; k += SPAN, to += LANES * PANEL) {
    const Index words = words_of(std::min(SPAN, end - k));
    for (Index i = 0; i < PANEL; i += LANES) {
      const Square square = square_of(m, first + i, k, false);
      for (Index w = 0; w < words; w++) store(to + w * PANEL + i, square[w]);
    }
  }
}

// Lines of memory that panels will be made of, asked for while others are multiplied: they lie too far apart for the
// processor to foresee.
class Ahead {
 public:
  // The panel of rows from `first` on, columns from `begin` to `end`.
  void add(const Matrix& m, Index first, Index begin, Index end) {
    const Index rows = std::min(PANEL, m.rows - first), columns = end - begin, size = m.single ? 4 : 2;
    if (rows <= 0) return;
    const char* at = static_cast<const char*>(m.at) + (first * m.row + begin * m.column) * size;
    const bool by_rows = m.column == 1;
    parts_.push_back({at, (by_rows ? m.row : m.column) * size, by_rows ? rows : columns,
                      ((by_rows ? columns : rows) * size + LINE - 1) / LINE});
    left_ += parts_.back().runs * parts_.back().lines;
  }

  void clear() { parts_.clear(), left_ = part_ = run_ = line_ = 0; }
  Index left() const { return left_; }

  void fetch(Index count) {
    for (count = std::min(count, left_), left_ -= count; count > 0; count--) {
      const Part& part = parts_[part_];
      __builtin_prefetch(part.at + run_ * part.stride + line_ * LINE, 0, 2);
      if (++line_ < part.lines) continue;
      line_ = 0;
      if (++run_ == part.runs) run_ = 0, part_++;
    }
  }

 private:
  static constexpr Index LINE = 64;
  struct Part {
    const char* at;
    Index stride, runs, lines;  // of runs, which lie apart
  };
  std::vector<Part> parts_;
  Index left_ = 0, part_ = 0, run_ = 0, line_ = 0;
};

// Rows from `first` to `last`, columns from `begin` to `end`: [row][word], rows `stride` apart.
[[gnu::noinline]] inline void lay_rows(Word* to, Index stride, const Matrix& m, Index first, Index last, Index begin,
                                       Index end) {
  for (Index i = first; i < last; i += LANES, to += LANES * stride)
    for (Index k = begin, w = 0; k < end; k += SPAN, w += LANES) {
      const Square square = square_of(m, i, k, true);
      for (Index j = 0; j < std::min(LANES, last - i); j++) store(to + j * stride + w, square[j]);
    }
}

}  // namespace
}  // namespace truetune
