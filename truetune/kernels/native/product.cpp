// Sums of products of matrices, added up in fp32 and rounded once:
//
//   y_tn = alpha (sum over s, k of x_s[t, k] w_s[n, k]) + beta d_tn
//
// Several pairs (x_s, w_s) are one contraction: a frozen weight and its adapter, or the gradients of layers that read
// one input. Outputs stand in panels, whose weights are laid out once and stay in the second cache while all rows pass;
// sums of a tile of rows and a panel stay in registers over a slice of words. The order of a sum depends neither on
// threads nor on other rows. Of a symmetric y only blocks that reach the diagonal or lie below it are multiplied; the
// others are copies. After Goto & van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication.
// Left out: sums of products of fp32, and batches.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "layout.h"

namespace truetune {
namespace {

using at::Tensor;

constexpr Index SLICE = 2048;    // words of panels that stay in the second cache
constexpr Index SHORT = 64;      // the same where few rows pass, and what is laid out is used but once
constexpr Index KEPT = 1 << 21;  // sums of all panels that are kept from slice to slice
constexpr Index HEIGHT = 48;     // rows that are shared out to threads together: whole tiles of any height, and vectors

template <int N>
constexpr int TALL = N == 4 ? 6 : 8;  // rows whose sums over N vectors leave registers for the operands

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

// Where sums go, and what is added to them: [rows, outputs], or one row for all.
class Target {
 public:
  Target(const Tensor& out, const std::optional<Tensor>& added, double alpha, double beta, bool symmetric)
      : out_(out), alpha_(static_cast<float>(alpha)), beta_(static_cast<float>(beta)), symmetric_(symmetric) {
    if (added) added_.emplace(added->expand(out.sizes()));
    TORCH_CHECK(out_.column == 1 && (!added_ || added_->column == 1),
                "outputs, and what is added to them, have to lie side by side");
    TORCH_CHECK(!symmetric || out_.rows == out_.columns, "what is symmetric has to be square");
  }

  // The first row of the outputs from n on that is no copy.
  Index top(Index n) const { return symmetric_ ? n : 0; }

  // How many vectors of row t and the panel of outputs from n on are no copies, and of how many rows from t on.
  std::pair<Index, Index> extent(Index t, Index n) const {
    const Index all = std::min<Index>(VECTORS, (out_.columns - n + LANES - 1) / LANES), below = t - n;
    if (!symmetric_ || below >= (all - 1) * LANES) return {all, out_.rows - t};
    return {below / LANES + 1, LANES - below % LANES};
  }

  // So many vectors of sums of rows from t on and outputs from n on, which are changed.
  void take(float* sums, Index rows, Index vectors, Index t, Index n) const {
    const Index width = std::min(vectors * LANES, out_.columns - n);
    if (added_ || alpha_ != 1)
      added_ && !added_->single ? add<uint16_t>(sums, rows, width, t, n) : add<float>(sums, rows, width, t, n);
    out_.single ? take_as<Fp32>(sums, rows, width, t, n) : take_as<Bf16>(sums, rows, width, t, n);
  }

  // What was taken below the diagonal, as outputs of the rows from n on.
  void mirror(const float* taken, Index rows, Index t, Index n) const {
    if (symmetric_) out_.single ? mirror_as<Fp32>(taken, rows, t, n) : mirror_as<Bf16>(taken, rows, t, n);
  }

 private:
  // In a pass of its own: stores of outputs wait for the memory, and others behind them.
  template <class T>
  void add(float* sums, Index rows, Index width, Index t, Index n) const {
    for (Index i = 0; i < rows; i++, t++, sums += PANEL) {
      const T* from = added_ ? added_->place<const T>(t, n) : nullptr;
      for (Index j = 0; j < width; j += LANES) {
        const Vec sum = alpha_ * load<Vec>(sums + j);
        store(sums + j, from ? sum + beta_ * read(from + j, width - j) : sum);
      }
    }
  }

  template <class E>
  void take_as(const float* sums, Index rows, Index width, Index t, Index n) const {
    for (Index i = 0; i < rows; i++, t++, sums += PANEL) {
      auto* to = out_.place<typename E::Element>(t, n);
      if (width == PANEL) {
#pragma GCC unroll 8
        for (Index j = 0; j < PANEL; j += LANES) E::convert(to + j, load<Vec>(sums + j));
        continue;
      }
      for (Index j = 0; j < width; j += LANES) write<E>(to + j, load<Vec>(sums + j), width - j);
    }
  }

  template <class E>
  void mirror_as(const float* taken, Index rows, Index t, Index n) const {
    for (Index i = 0; i < rows; i += LANES)
      for (Index j = 0; j < std::min(PANEL, t + i - n); j += LANES) {
        Square square;
        for (Index k = 0; k < LANES; k++) square[k] = load<Words>(taken + (i + k) * PANEL + j);
        exchange(square);
        for (Index k = 0; k < LANES; k++)
          write<E>(out_.place<typename E::Element>(n + j + k, t + i), bits<Vec>(square[k]), rows - i);
      }
  }

  Matrix out_;
  std::optional<Matrix> added_;
  float alpha_, beta_;
  bool symmetric_;
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

// The same for the first of so many rows and so many vectors; their number.
template <int N = VECTORS, int COUNT = TALL<N>>
[[gnu::always_inline]] inline Index tile_of(Index rows, Index vectors, float* sums, bool add,
                                            const std::vector<Factors>& factors) {
  if constexpr (N > 1)
    if (vectors < N) return tile_of<N - 1>(rows, vectors, sums, add, factors);
  if constexpr (COUNT > 1)
    if (rows < COUNT) return tile_of<N, COUNT - 1>(rows, vectors, sums, add, factors);
  tile<COUNT, N>(sums, add, factors.data(), factors.data() + factors.size());
  return COUNT;
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
        arena_(4 * PANEL * (plan.largest + (whole_ ? up(count, HEIGHT) : HEIGHT)) + 128) {
    panel_ = arena_.take<Word>(plan.largest * PANEL);
    sums_ = arena_.take<float>((whole_ ? up(count, HEIGHT) : HEIGHT) * PANEL);
  }

  // Rows from `first` to `last` and panels of outputs from `begin` to `end`; panels within slices, so that a slice of x
  // is in the cache for all of them.
  void multiply(Index first, Index last, Index begin, Index end) {
    const Index slices = plan_.slices.size() - 1;
    for (Index s = 0; s < slices; s++)
      for (Index n = begin; n < end; n += PANEL) {
        ahead_.clear();
        if (n + PANEL < end) look_ahead(s, n + PANEL);
        else if (s + 1 < slices) look_ahead(s + 1, begin);
        else look_ahead(0, end);
        slice(s, first, last, n, sums_ + (whole_ ? (n - begin) * (last - first) : 0));
      }
  }

 private:
  void slice(Index s, Index first, Index last, Index n, float* sums) {
    const auto begin = plan_.pieces.begin() + plan_.slices[s], end = plan_.pieces.begin() + plan_.slices[s + 1];
    for (auto p = begin; p < end; p++) lay_panel(panel_ + p->place * PANEL, *p->w, n, p->begin, p->end);
    factors_.clear();
    for (auto p = begin; p < end; p++) factors_.push_back(factors(*p, first));
    const bool done = s + 2 == Index(plan_.slices.size());
    const Index lines = ahead_.left() / (last - first) + 1;  // for each row
    for (Index r = first; r < last; r += HEIGHT) {
      const Index rows = std::min(HEIGHT, last - r);
      float* block = whole_ ? sums + (r - first) * PANEL : sums;
      for (Index i = 0, tall; i < rows; i += tall) {
        const auto [vectors, most] = target_.extent(r + i, n);
        tall = tile_of(std::min(most, rows - i), vectors, block + i * PANEL, s > 0, factors_);
        if (done) target_.take(block + i * PANEL, tall, vectors, r + i, n);
        for (Factors& each : factors_) each.rows += tall * each.row;
        ahead_.fetch(tall * lines);
      }
      if (done) target_.mirror(block, rows, r, n);
    }
  }

  Factors factors(const Piece& p, Index r) const {
    const Word* panel = panel_ + p.place * PANEL;
    if (p.from >= 0) return {rows_ + r * plan_.laid_out + p.from, panel, plan_.laid_out, p.words};
    const auto* row = static_cast<const uint16_t*>(p.x->at) + r * p.x->row + p.begin;
    return {reinterpret_cast<const Word*>(row), panel, p.x->row / 2, p.words};
  }

  // For the panel of outputs from n on in slice s.
  void look_ahead(Index s, Index n) {
    for (Index i = plan_.slices[s]; i < plan_.slices[s + 1]; i++) {
      const Piece& p = plan_.pieces[i];
      ahead_.add(*p.w, n, p.begin, std::min(p.end, p.w->columns));
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

void products(at::TensorList x, at::TensorList w, const std::optional<Tensor>& added, const Tensor& out, double alpha,
              double beta, bool symmetric) {
  TORCH_CHECK(!x.empty() && x.size() == w.size(), "one weight for each x");
  const std::vector<Matrix> left(x.begin(), x.end()), right(w.begin(), w.end());
  const Index rows = out.size(0), outputs = out.size(1);
  for (size_t s = 0; s < left.size(); s++)
    TORCH_CHECK(left[s].rows == rows && right[s].rows == outputs && left[s].columns == right[s].columns,
                "x, weights and out have to be [rows, columns], [outputs, columns] and [rows, outputs]");
  if (!rows || !outputs) return;
  const Target target(out, added, alpha, beta, symmetric);
  const Plan plan(left, right);
  const Tensor words = laid_out(plan, out, rows);
  const auto blocks = [&](Index n) { return (rows - target.top(n) + HEIGHT - 1) / HEIGHT; };
  Index all = 0;
  for (Index n = 0; n < outputs; n += PANEL) all += blocks(n);
  at::parallel_for(0, all, 1, [&](Index begin, Index end) {
    const bool together = !symmetric && rows * outputs <= KEPT;  // panels, which then are as high as the first
    const Index most = together ? std::max<Index>((end - begin) / blocks(0), 1) : 1;
    Share share(plan, reinterpret_cast<const Word*>(words.data_ptr<int>()), target, rows * most);
    for (Index n = 0, wide; n < outputs && end > 0; n += wide) {
      const Index height = blocks(n), from = std::max<Index>(begin, 0), to = std::min(end, height);
      const Index panels = together && begin <= 0 ? std::max<Index>(end / height, 1) : 1;
      wide = panels * PANEL, begin -= panels * height, end -= panels * height;
      if (from >= to) continue;
      const Index first = target.top(n) + from * HEIGHT, last = std::min(rows, target.top(n) + to * HEIGHT);
      share.multiply(first, last, n, n + wide);
    }
  });
}

}  // namespace
}  // namespace truetune

TORCH_LIBRARY_FRAGMENT(TRUETUNE_LIBRARY, library) {
  library.def("products(Tensor[] x, Tensor[] w, Tensor? added, Tensor(a!) out, float alpha=1, float beta=1, "
              "bool symmetric=False) -> ()");
}

TORCH_LIBRARY_IMPL(TRUETUNE_LIBRARY, CPU, library) { library.impl("products", truetune::products); }
