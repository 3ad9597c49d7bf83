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
constexpr Index SLICE = 2048;             // words of panels that stay in the second cache
constexpr Index SHORT = 64;               // the same where few rows pass, and what is laid out is used but once
constexpr Index KEPT = 1 << 21;           // sums of all panels that are kept from slice to slice
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
  Vec y[COUNT][N];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) y[i][j] = add ? load<Vec>(sums + i * PANEL + j * LANES) : Vec{};
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
    for (int j = 0; j < N; j++) store(sums + i * PANEL + j * LANES, y[i][j]);
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
  bool few;  // whether so few rows pass that weights whose columns lie apart are best read along their rows

  Plan(const std::vector<Matrix>& x, const std::vector<Matrix>& w)
      : few(x[0].rows <= HEIGHT && std::all_of(w.begin(), w.end(), [](const Matrix& m) { return m.column != 1; })) {
    const Index slice = few ? SHORT : SLICE, piece = Bf16::PER_WORD * (few ? slice : slice / 2);
    Index filled = 0;
    for (size_t s = 0; s < x.size(); s++) {
      const bool paired = x[s].columns % 2 == 0 && x[s].row % 2 == 0 && x[s].column == 1;
      const bool direct = !x[s].single && paired && Bf16::PER_WORD == 2;
      for (Index begin = 0; begin < x[s].columns; begin += piece) {
        const Index end = std::min(begin + piece, x[s].columns), size = words_of(end - begin);
        if (filled && filled + size > slice) slices.push_back(pieces.size()), filled = 0;
        pieces.push_back({&x[s], &w[s], begin, up(end, 2), filled, direct ? -1 : laid_out, size});
        filled += size, laid_out += direct ? 0 : up(size, LANES), largest = std::max(largest, filled);
      }
    }
    slices.push_back(pieces.size());
  }
};

// One thread's share.
class Share {
 public:
  // count: rows of all panels whose sums are kept from slice to slice.
  Share(const Plan& plan, const Word* rows, const Target& target, Index count)
      : plan_(plan), rows_(rows), target_(target), whole_(plan.slices.size() > 2),
        arena_(4 * PANEL * (plan.largest + (whole_ ? count : HEIGHT)) + 128) {
    panel_ = arena_.take<Word>(plan.largest * PANEL);
    sums_ = arena_.take<float>((whole_ ? count : HEIGHT) * PANEL);
  }

  // Rows from `first` to `last` and panels of outputs from `begin` to `end`; panels within slices, so that a slice of x
  // is in the cache for all of them.
  void multiply(Index first, Index last, Index begin, Index end) {
    const Index slices = plan_.slices.size() - 1;
    for (Index s = 0; s < slices; s++)
      for (Index panel = begin; panel < end; panel++) {
        ahead_.clear();
        if (panel + 1 < end) look_ahead(s, panel + 1);
        else if (s + 1 < slices) look_ahead(s + 1, begin);
        else look_ahead(0, end);
        float* sums = sums_ + (whole_ ? (panel - begin) * (last - first) * PANEL : 0);
        const Index vectors = std::min<Index>(VECTORS, (target_.outputs - panel * PANEL + LANES - 1) / LANES);
        vectors == 1   ? slice<1>(s, first, last, panel * PANEL, sums)
        : vectors == 2 ? slice<2>(s, first, last, panel * PANEL, sums)
        : vectors == 3 ? slice<3>(s, first, last, panel * PANEL, sums)
                       : slice<4>(s, first, last, panel * PANEL, sums);
      }
  }

 private:
  template <int N>
  void slice(Index s, Index first, Index last, Index n, float* sums) {
    const auto begin = plan_.pieces.begin() + plan_.slices[s], end = plan_.pieces.begin() + plan_.slices[s + 1];
    for (auto p = begin; p < end; p++) lay_panel(panel_ + p->place * PANEL, *p->w, n, p->begin, p->end);
    factors_.clear();
    for (auto p = begin; p < end; p++) factors_.push_back(factors(*p, first));
    const Index lines = ahead_.left() * TALL<N> / (last - first) + 1;
    for (Index r = first; r < last; r += TALL<N>, sums += whole_ ? TALL<N> * PANEL : 0) {
      const Index rows = std::min<Index>(TALL<N>, last - r);
      tile_of<N>(rows, sums, s > 0, factors_);
      if (s + 2 == Index(plan_.slices.size())) target_.take(sums, rows, r, n);
      for (Factors& each : factors_) each.rows += TALL<N> * each.row;
      ahead_.fetch(lines);
    }
  }

  Factors factors(const Piece& p, Index r) const {
    const Word* panel = panel_ + p.place * PANEL;
    if (p.from >= 0) return {rows_ + r * plan_.laid_out + p.from, panel, plan_.laid_out, p.words};
    const auto* row = static_cast<const uint16_t*>(p.x->at) + r * p.x->row + p.begin;
    return {reinterpret_cast<const Word*>(row), panel, p.x->row / 2, p.words};
  }

  void look_ahead(Index s, Index panel) {
    for (Index i = plan_.slices[s]; i < plan_.slices[s + 1]; i++) {
      const Piece& p = plan_.pieces[i];
      ahead_.add(*p.w, panel * PANEL, p.begin, std::min(p.end, p.w->columns));
    }
  }

  const Plan& plan_;
  const Word* rows_;
  const Target& target_;
  bool whole_;  // whether sums are kept from slice to slice
  Arena arena_;
  Word* panel_;
  float* sums_;
  std::vector<Factors> factors_;
  Ahead ahead_;
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
    const bool together = rows * outputs <= KEPT;
    Share share(plan, reinterpret_cast<const Word*>(words.data_ptr<int>()), target,
                rows * (together ? (end - begin + blocks - 1) / blocks : 1));
    while (begin < end) {
      const Index panel = begin / blocks, whole = begin % blocks == 0 && together ? end / blocks - panel : 0;
      const Index stop = whole > 0 ? (panel + whole) * blocks : std::min(end, (panel + 1) * blocks);
      const Index first = begin % blocks * HEIGHT, last = std::min(rows, (stop - panel * blocks) * HEIGHT);
      share.multiply(first, last, panel, panel + std::max<Index>(whole, 1));
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
