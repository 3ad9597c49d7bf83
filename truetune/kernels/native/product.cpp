// Sums of products of matrices, added up in fp32 and rounded once:
//
//   y_tn = sum over s, k of x_s[t, k] w_s[n, k] + b_n
//
// Several pairs (x_s, w_s) are one contraction: a frozen weight and its adapter, or the gradients of layers that read
// one input. Outputs stand in panels, whose weights are laid out once and stay in the second cache while all rows pass;
// sums of a tile of rows and a panel stay in registers over a slice of words. The order of a sum depends neither on
// threads nor on other rows. After Goto & van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication.
// Left out: sums of products of fp32, and batches.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "reading.h"

namespace truetune {
namespace {

using at::Tensor;

constexpr int VECTORS = 4;                // of outputs in one panel
constexpr Index PANEL = VECTORS * LANES;
constexpr Index SLICE = 1024;             // words of a piece; a slice, up to two, stays in the second cache
constexpr Index HEIGHT = 48;              // rows that are shared out to threads together: whole tiles of any height

template <int N>
constexpr int TALL = N == 4 ? 6 : 8;  // rows whose sums over N vectors leave registers for the operands

// A matrix [rows, columns], contracted over its columns, one of whose strides is 1.
struct Matrix {
  const void* at;
  bool single;
  Index rows, columns, row, column;

  explicit Matrix(const Tensor& t)
      : at(t.data_ptr()), single(t.scalar_type() == at::kFloat), rows(t.size(0)), columns(t.size(1)),
        row(t.stride(0)), column(t.stride(1)) {
    TORCH_CHECK(single || t.scalar_type() == at::kBFloat16, "matrices have to be float or bfloat16");
    if (columns == 1) column = 1;
    if (rows == 1 && column != 1) row = 1;
    TORCH_CHECK(row == 1 || column == 1, "rows or columns have to lie side by side");
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
  const T* from = static_cast<const T*>(m.at) + row * m.row + column * m.column;
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
void lay_panel(Word* to, const Matrix& m, Index first, Index begin, Index end) {
  for (Index k = begin; k < end; k += SPAN, to += LANES * PANEL) {
    const Index words = words_of(std::min(SPAN, end - k));
    for (Index i = 0; i < PANEL; i += LANES) {
      const Square square = square_of(m, first + i, k, false);
      for (Index w = 0; w < words; w++) store(to + w * PANEL + i, square[w]);
    }
  }
}

// Rows from `first` to `last`, columns from `begin` to `end`: [row][word], rows `stride` apart.
void lay_rows(Word* to, Index stride, const Matrix& m, Index first, Index last, Index begin, Index end) {
  for (Index i = first; i < last; i += LANES, to += LANES * stride)
    for (Index k = begin, w = 0; k < end; k += SPAN, w += LANES) {
      const Square square = square_of(m, i, k, true);
      for (Index j = 0; j < std::min(LANES, last - i); j++) store(to + j * stride + w, square[j]);
    }
}

// A part of the contraction. `place`: where it begins, in words of a panel. Rows of x are read where they are, or, if
// `from` is not negative, as they were laid out: where it begins, in words of a row.
struct Piece {
  const Matrix *x, *w;
  Index begin, end, place, from, words;
};

// What a tile multiplies: its rows of x, `row` words apart, and a panel.
struct Factors {
  const Word *rows, *panel;
  Index row, words;
};

struct Target {
  void* at;
  bool single;
  Index row, outputs;
  const float* bias;

  // Sums of rows from t on and a panel of outputs from n on.
  void take(const float* sums, Index rows, Index t, Index n) const {
    single ? take_as<Fp32>(sums, rows, t, n) : take_as<Bf16>(sums, rows, t, n);
  }

  template <class E>
  void take_as(const float* sums, Index rows, Index t, Index n) const {
    const Index width = std::min(PANEL, outputs - n);
    auto* to = static_cast<typename E::Element*>(at) + t * row + n;
    for (Index i = 0; i < rows; i++, to += row, sums += PANEL) {
      if (width == PANEL && !bias) {
#pragma GCC unroll 8
        for (Index j = 0; j < PANEL; j += LANES) E::convert(to + j, load<Vec>(sums + j));
        continue;
      }
      for (Index j = 0; j < width; j += LANES) {
        const Vec sum = load<Vec>(sums + j);
        write<E>(to + j, bias ? sum + read(bias + n + j, width - j) : sum, width - j);
      }
    }
  }
};

// sums [COUNT, N vectors] = the factors' products, or += them where `add`.
template <int COUNT, int N>
[[gnu::noinline]] void tile(float* sums, bool add, const Factors* first, const Factors* last) {
  Vec y[COUNT][N]{};
  for (; first < last; first++) {
    const Word *a = first->rows, *panel = first->panel, *end = panel + first->words * PANEL;
    const Index row = first->row;
    for (; panel < end; panel += PANEL, a++) {
      Words columns[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) columns[j] = load<Words>(panel + j * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; i++) {
        const Word spread = load<Word>(a + i * row);
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) y[i][j] = Bf16::multiply_add(y[i][j], spread, columns[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      float* sum = sums + i * PANEL + j * LANES;
      store(sum, add ? y[i][j] + load<Vec>(sum) : y[i][j]);
    }
}

// The same for COUNT rows at most.
template <int N, int COUNT = TALL<N>>
void tile_of(Index rows, float* sums, bool add, const std::vector<Factors>& factors) {
  if (rows >= COUNT) return tile<COUNT, N>(sums, add, factors.data(), factors.data() + factors.size());
  if constexpr (COUNT > 1) tile_of<N, COUNT - 1>(rows, sums, add, factors);
}

// Where every piece begins, and slices of pieces that rows pass one after the other.
struct Plan {
  std::vector<Piece> pieces;
  std::vector<Index> slices{0};  // first pieces, and the end
  Index largest = 0, laid_out = 0;  // words of a slice, and of a row of x that is laid out

  Plan(const std::vector<Matrix>& x, const std::vector<Matrix>& w) {
    Index filled = 0;
    for (size_t s = 0; s < x.size(); s++) {
      const bool paired = x[s].columns % 2 == 0 && x[s].row % 2 == 0 && x[s].column == 1;
      const bool direct = !x[s].single && paired && Bf16::PER_WORD == 2;
      for (Index begin = 0; begin < x[s].columns; begin += 2 * SLICE) {
        const Index end = std::min(begin + 2 * SLICE, x[s].columns), size = words_of(end - begin);
        if (filled && filled + size > 2 * SLICE) slices.push_back(pieces.size()), filled = 0;
        pieces.push_back({&x[s], &w[s], begin, up(end, 2), filled, direct ? -1 : laid_out, size});
        filled += size, laid_out += direct ? 0 : up(size, LANES), largest = std::max(largest, filled);
      }
    }
    slices.push_back(pieces.size());
  }
};

// One thread's share: tiles of rows from `begin` to `end`, panel after panel.
class Share {
 public:
  Share(const Plan& plan, const Word* rows, const Target& target, Index count)
      : plan_(plan), rows_(rows), target_(target), whole_(plan.slices.size() > 2),
        arena_(4 * PANEL * (plan.largest + (whole_ ? count : HEIGHT)) + 128) {
    panel_ = arena_.take<Word>(plan.largest * PANEL);
    sums_ = arena_.take<float>((whole_ ? count : HEIGHT) * PANEL);
  }

  // Rows from `first` to `last` and the panel of outputs from n on.
  template <int N>
  void multiply(Index first, Index last, Index n) {
    for (size_t s = 0; s + 1 < plan_.slices.size(); s++) {
      const auto begin = plan_.pieces.begin() + plan_.slices[s], end = plan_.pieces.begin() + plan_.slices[s + 1];
      for (auto p = begin; p < end; p++) lay_panel(panel_ + p->place * PANEL, *p->w, n, p->begin, p->end);
      factors_.clear();
      for (auto p = begin; p < end; p++) factors_.push_back(factors(*p, first));
      for (Index r = first; r < last; r += TALL<N>) {
        const Index rows = std::min<Index>(TALL<N>, last - r);
        float* sums = whole_ ? sums_ + (r - first) * PANEL : sums_;
        tile_of<N>(rows, sums, s > 0, factors_);
        if (s + 2 == plan_.slices.size()) target_.take(sums, rows, r, n);
        for (Factors& each : factors_) each.rows += TALL<N> * each.row;
      }
    }
  }

 private:
  Factors factors(const Piece& p, Index r) const {
    const Word* panel = panel_ + p.place * PANEL;
    if (p.from >= 0) return {rows_ + r * plan_.laid_out + p.from, panel, plan_.laid_out, p.words};
    const auto* row = static_cast<const uint16_t*>(p.x->at) + r * p.x->row + p.begin;
    return {reinterpret_cast<const Word*>(row), panel, p.x->row / 2, p.words};
  }

  const Plan& plan_;
  const Word* rows_;
  const Target& target_;
  bool whole_;  // whether sums of all rows are kept from slice to slice
  Arena arena_;
  Word* panel_;
  float* sums_;
  std::vector<Factors> factors_;
};

// What of x can't be read where it is: [row][word].
Tensor laid_out(const Plan& plan, const Tensor& out, Index rows) {
  const Tensor words = at::empty({rows * plan.laid_out}, out.options().dtype(at::kInt));
  if (!plan.laid_out) return words;
  at::parallel_for(0, rows, HEIGHT, [&](Index begin, Index end) {
    for (const Piece& p : plan.pieces)
      if (p.from >= 0) {
        Word* to = reinterpret_cast<Word*>(words.data_ptr<int>()) + begin * plan.laid_out + p.from;
        lay_rows(to, plan.laid_out, *p.x, begin, end, p.begin, p.end);
      }
  });
  return words;
}

void products(at::TensorList x, at::TensorList w, const std::optional<Tensor>& bias, const Tensor& out) {
  TORCH_CHECK(!x.empty() && x.size() == w.size(), "one weight for each x");
  const std::vector<Matrix> left(x.begin(), x.end()), right(w.begin(), w.end());
  const Index rows = out.size(0), outputs = out.size(1);
  for (size_t s = 0; s < left.size(); s++)
    TORCH_CHECK(left[s].rows == rows && right[s].rows == outputs && left[s].columns == right[s].columns,
                "x, weights and out have to be [rows, columns], [outputs, columns] and [rows, outputs]");
  TORCH_CHECK(out.stride(1) == 1 || outputs == 1, "outputs have to lie side by side");
  if (bias)
    TORCH_CHECK(bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == outputs,
                "the bias has to be float [outputs]");
  if (!rows || !outputs) return;
  const Target target{out.data_ptr(), out.scalar_type() == at::kFloat, out.stride(0), outputs,
                      bias ? data<float>(*bias) : nullptr};
  TORCH_CHECK(target.single || out.scalar_type() == at::kBFloat16, "outputs have to be float or bfloat16");
  const Plan plan(left, right);
  const Tensor words = laid_out(plan, out, rows);
  const Index panels = (outputs + PANEL - 1) / PANEL, blocks = (rows + HEIGHT - 1) / HEIGHT;
  at::parallel_for(0, panels * blocks, 1, [&](Index begin, Index end) {
    Share share(plan, reinterpret_cast<const Word*>(words.data_ptr<int>()), target, rows);
    while (begin < end) {
      const Index panel = begin / blocks, stop = std::min(end, (panel + 1) * blocks), n = panel * PANEL;
      const Index first = begin % blocks * HEIGHT, last = std::min(rows, (stop - panel * blocks) * HEIGHT);
      const Index vectors = std::min<Index>(VECTORS, (outputs - n + LANES - 1) / LANES);
      vectors == 1   ? share.multiply<1>(first, last, n)
      : vectors == 2 ? share.multiply<2>(first, last, n)
      : vectors == 3 ? share.multiply<3>(first, last, n)
                     : share.multiply<4>(first, last, n);
      begin = stop;
    }
  });
}

}  // namespace
}  // namespace truetune

TORCH_LIBRARY_FRAGMENT(TRUETUNE_LIBRARY, library) {
  library.def("products(Tensor[] x, Tensor[] w, Tensor? bias, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(TRUETUNE_LIBRARY, CPU, library) { library.impl("products", truetune::products); }
