// Products with a frozen weight in 8 bits: rows quantised on the fly, whole numbers multiplied, rounded once.
//
//   s_tg = max over k in g of |c_k x_tk| / 127,  q_tk = c_k x_tk / s_tg, to the nearest, ties to even
//   y_tn = e_n (sum over g of s_tg (sum over k in g of q_tk w_nk)) + b_n + sum over r of low_tr up_nr
//
// Groups g are of GROUP columns: an outlier costs its own group alone. What is no number makes its group's scale none,
// and so all outputs of its row. Processors multiply unsigned with signed bytes: weights are kept + 128, and 128 times
// the sum of a group's q is taken off. Left out: zero points.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "reading.h"

#if defined(__AVX512VNNI__) && !defined(TRUETUNE_PLAIN)
#include <immintrin.h>
#define TRUETUNE_QUADS 1
#else
#define TRUETUNE_QUADS 0
#endif

namespace truetune {
namespace {

using at::Tensor;

constexpr Index QUAD = 4;                  // bytes of a word
constexpr Index VECTORS = 4;               // of one panel
constexpr Index PANEL = VECTORS * LANES;   // outputs whose weights stand together: [panel][word][output]
constexpr int TILE = 6;                    // rows whose sums, with a panel's, fill the registers
constexpr Index BLOCK = 16 * TILE;         // rows that stay in the second cache while panels pass
constexpr Index GROUP = 128;               // columns of one scale
constexpr float LEVELS = 127;

// sum + the four products of unsigned weights and signed values.
inline Ints multiply_add_bytes(const Ints& sum, const Words& weights, Word values) {
#if TRUETUNE_QUADS
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(values));
#else
  Ints total = sum;
  for (int i = 0; i < QUAD; i++) total += bits<Ints>((weights >> 8 * i) & 255u) * int8_t(values >> 8 * i);
  return total;
#endif
}

// One group of a row, its first `count` columns, or all GROUP where WHOLE; of `to` are written up to `room` bytes.
template <class E, bool WHOLE>
void quantize_group(const typename E::Element* from, const float* factors, Index count, int8_t* to, Index room,
                    float* scale, int32_t* sum) {
  using Bytes = int8_t __attribute__((vector_size(LANES)));
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: a float of that size has no fraction
  constexpr Index PARTS = GROUP / LANES;
  Vec parts[PARTS];
  Ints most{};  // as the bits of positive floats, which are in order, and end with what is no number
#pragma GCC unroll 8
  for (Index i = 0; i < PARTS; i++) {
    const Index left = WHOLE ? LANES : std::max<Index>(count - i * LANES, 0);
    parts[i] = read(from + i * LANES, left);
    if (factors) parts[i] *= read(factors + i * LANES, left);
    const Ints above = bits<Ints>(parts[i]) & INT32_MAX;
    most = above > most ? above : most;
  }
  most = across(most, [](const Ints& a, const Ints& b) { return a > b ? a : b; });
  const float largest = bits<float>(most[0]), inverse = LEVELS / largest;
  const bool odd = !std::isfinite(largest), nothing = !std::isfinite(inverse);  // below 4e-37 it is 0
  *scale = odd ? NAN : nothing ? 0 : largest / LEVELS;
  const float factor = odd || nothing ? 0 : inverse;
  Ints total{};
#pragma GCC unroll 8
  for (Index i = 0; i < PARTS; i++) {
    // The bound changes nothing, but keeps compilers from rounding product and sum in one, with other ties.
    const Vec scaled = parts[i] * factor, bounded = scaled < LEVELS + 1 ? scaled : LEVELS + 1 - Vec{};
    const Vec shifted = odd ? ROUND - Vec{} : bounded + ROUND;
    const Ints whole = bits<Ints>(shifted) - bits<int32_t>(ROUND);
    const Bytes bytes = __builtin_convertvector(whole, Bytes);
    if (WHOLE || room - i * LANES >= LANES)
      store(to + i * LANES, bytes);
    else if (room > i * LANES)
      std::memcpy(to + i * LANES, &bytes, room - i * LANES);
    total += whole;
  }
  *sum = across(total, [](const Ints& a, const Ints& b) { return a + b; })[0];
}

template <class E>
void quantize_rows(const Tensor& x, const Tensor& columns, const Tensor& values, const Tensor& scales,
                   const Tensor& sums) {
  const Index size = x.size(1), width = values.size(1), groups = scales.size(1);
  const float* factors = data<float>(columns);
  at::parallel_for(0, x.size(0), TILE, [&](Index first, Index last) {
    for (Index row = first; row < last; row++)
      for (Index group = 0; group < groups; group++) {
        const Index begin = group * GROUP, count = std::min(size - begin, GROUP), place = row * groups + group;
        (count == GROUP ? quantize_group<E, true> : quantize_group<E, false>)(
            data<typename E::Element>(x) + row * size + begin, factors ? factors + begin : nullptr, count,
            data<int8_t>(values) + row * width + begin, width - begin, data<float>(scales) + place,
            data<int32_t>(sums) + place);
      }
  });
}

// q [rows, columns up to whole words], and of each group s and the sum of q [rows, groups].
std::tuple<Tensor, Tensor, Tensor> int8_quantize(const Tensor& x, const std::optional<Tensor>& columns) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x has to be [rows, columns], contiguous");
  const Tensor factors = columns.value_or(Tensor());
  if (factors.defined())
    TORCH_CHECK(factors.scalar_type() == at::kFloat && factors.is_contiguous() && factors.numel() == x.size(1),
                "factors have to be float [columns]");
  const Tensor values = at::empty({x.size(0), up(x.size(1), QUAD)}, x.options().dtype(at::kChar));
  const Index groups = (x.size(1) + GROUP - 1) / GROUP;
  const Tensor scales = at::empty({x.size(0), groups}, x.options().dtype(at::kFloat));
  const Tensor sums = at::empty({x.size(0), groups}, x.options().dtype(at::kInt));
  (x.scalar_type() == at::kFloat ? quantize_rows<Fp32> : quantize_rows<Bf16>)(x, factors, values, scales, sums);
  return {values, scales, sums};
}

// Weights [outputs, columns] -> [panels, words, PANEL, 4], + 128; what is missing is 0.
Tensor int8_pack(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == at::kChar,
              "weights have to be int8 [outputs, columns], contiguous");
  const Index outputs = weight.size(0), columns = weight.size(1), words = up(columns, QUAD) / QUAD;
  const Tensor packed = at::empty({up(outputs, PANEL) / PANEL, words, PANEL, QUAD}, weight.options().dtype(at::kByte));
  const int8_t* from = data<int8_t>(weight);
  uint8_t* to = data<uint8_t>(packed);
  std::fill_n(to, packed.numel(), 128);
  for (Index n = 0; n < outputs; n++)
    for (Index k = 0; k < columns; k++)
      to[((n / PANEL * words + k / QUAD) * PANEL + n % PANEL) * QUAD + k % QUAD] = from[n * columns + k] + 128;
  return packed;
}

struct Product {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  const uint8_t* weights;
  const float *factors, *bias;
  const void *low, *up;
  void* out;
  Index words, groups, outputs, steps;  // steps: words of low and up in a row
};

// y [COUNT, PANEL] = what a group's `words` add to COUNT rows of values, `row` words apart, and a panel; or += it where
// `add`. Sums leave the registers through memory: to keep both in them is more than there are.
template <int COUNT>
[[gnu::noinline]] void group(float* y, bool add, const Word* values, Index row, const Word* weights, Index words,
                             const float* scales, const int32_t* sums, Index groups) {
  Ints whole[COUNT][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) whole[i][j] = -128 * sums[i * groups] - Ints{};
  for (const Word* end = weights + words * PANEL; weights < end; weights += PANEL, values++) {
    Words column[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) column[j] = load<Words>(weights + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
      const Word spread = load<Word>(values + i * row);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; j++) whole[i][j] = multiply_add_bytes(whole[i][j], column[j], spread);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
      float* to = y + i * PANEL + j * LANES;
      const Vec sum = add ? load<Vec>(to) : Vec{};
      store(to, sum + __builtin_convertvector(whole[i][j], Vec) * scales[i * groups]);
    }
}

// The outputs of COUNT rows from `row` on and of one panel: y times their factors, and what is added.
template <class E, int COUNT>
[[gnu::noinline]] void finish(const Product& p, const float* y, Index row, Index panel) {
  Vec sums[COUNT][VECTORS];
  const Index first = panel * PANEL, left = p.outputs - first;
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; j++) {
    const Index start = j * LANES, rest = std::max<Index>(left - start, 0);
    const Vec factor = p.factors ? read(p.factors + first + start, rest) : 1.0f - Vec{};
    const Vec bias = p.bias ? read(p.bias + first + start, rest) : Vec{};
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) sums[i][j] = load<Vec>(y + i * PANEL + start) * factor + bias;
  }
  const Word* up_words = static_cast<const Word*>(p.up) + panel * p.steps * PANEL;
  const Word* low_words = static_cast<const Word*>(p.low) + row * p.steps;
  for (Index r = 0; r < p.steps; r++, up_words += PANEL) {
    Words column[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) column[j] = load<Words>(up_words + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
      const Word spread = low_words[i * p.steps + r];
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; j++) sums[i][j] = E::multiply_add(sums[i][j], spread, column[j]);
    }
  }
  auto* to = static_cast<typename E::Element*>(p.out) + row * p.outputs + first;
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++)
      if (left > j * LANES) write<E>(to + i * p.outputs + j * LANES, sums[i][j], left - j * LANES);
}

// COUNT rows from `row` on, of one panel.
template <class E, int COUNT>
void tile(const Product& p, Index row, Index panel) {
  float y[COUNT * PANEL];
  constexpr Index LONG = GROUP / QUAD;
  const Word* weights = reinterpret_cast<const Word*>(p.weights) + panel * p.words * PANEL;
  const Word* values = reinterpret_cast<const Word*>(p.values) + row * p.words;
  for (Index g = 0; g < p.groups; g++) {
    const Index w = g * LONG, place = row * p.groups + g;
    group<COUNT>(y, g > 0, values + w, p.words, weights + w * PANEL, std::min(LONG, p.words - w), p.scales + place,
                 p.sums + place, p.groups);
  }
  finish<E, COUNT>(p, y, row, panel);
}

template <class E, int COUNT = TILE>
void rest(const Product& p, Index row, Index count, Index panel) {
  if (count == COUNT) return tile<E, COUNT>(p, row, panel);
  if constexpr (COUNT > 1) rest<E, COUNT - 1>(p, row, count, panel);
}

template <class E>
void multiply_all(const Product& p, Index rows, Index panels) {
  const Index blocks = (rows + BLOCK - 1) / BLOCK;
  at::parallel_for(0, blocks * panels, 1, [&](Index begin, Index end) {
    for (Index item = begin; item < end; item++) {
      const Index stop = std::min(rows, (item % blocks + 1) * BLOCK);
      for (Index row = item % blocks * BLOCK; row < stop; row += TILE)
        rest<E>(p, row, std::min<Index>(TILE, stop - row), item / blocks);
    }
  });
}

const float* floats(const std::optional<Tensor>& t, Index count) {
  if (!t) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == count, "has to be float [outputs]");
  return data<float>(*t);
}

// y [rows, outputs]. low is [rows, words] and up [panels, words, PANEL]: int32 words of one float, or of two bf16
// where `paired`, as y then is.
Tensor int8_product(const Tensor& values, const Tensor& scales, const Tensor& sums, const Tensor& packed,
                    int64_t outputs, const std::optional<Tensor>& factors, const std::optional<Tensor>& bias,
                    const Tensor& low, const Tensor& up_words, bool paired) {
  const Index rows = values.size(0), panels = packed.size(0), words = packed.size(1), steps = low.size(1);
  const Index groups = (words * QUAD + GROUP - 1) / GROUP;
  TORCH_CHECK(values.is_contiguous() && packed.is_contiguous() && packed.size(2) == PANEL &&
                  values.size(1) == words * QUAD && panels == up(outputs, PANEL) / PANEL,
              "values and weights have to be of int8_quantize and int8_pack, of the same columns");
  TORCH_CHECK(scales.numel() == rows * groups && sums.numel() == rows * groups && low.size(0) == rows,
              "one low a row, and a scale and a sum a group");
  TORCH_CHECK(low.scalar_type() == at::kInt && up_words.scalar_type() == at::kInt && low.is_contiguous() &&
                  up_words.is_contiguous() && up_words.numel() == panels * steps * PANEL,
              "low and up have to be words, [rows, words] and [panels, words, PANEL]");
  const Tensor out = at::empty({rows, outputs}, scales.options().dtype(paired ? at::kBFloat16 : at::kFloat));
  const Product p{data<int8_t>(values),   data<float>(scales),    data<int32_t>(sums), data<uint8_t>(packed),
                  floats(factors, outputs), floats(bias, outputs), low.data_ptr(),      up_words.data_ptr(),
                  out.data_ptr(),         words,                  groups,              outputs,               steps};
  (paired ? multiply_all<Bf16> : multiply_all<Fp32>)(p, rows, panels);
  return out;
}

}  // namespace
}  // namespace truetune

TORCH_LIBRARY_FRAGMENT(TRUETUNE_LIBRARY, library) {
  library.def("int8_quantize(Tensor x, Tensor? columns) -> (Tensor, Tensor, Tensor)");
  library.def("int8_pack(Tensor weight) -> Tensor");
  library.def("int8_product(Tensor values, Tensor scales, Tensor sums, Tensor packed, int outputs, Tensor? factors,"
              " Tensor? bias, Tensor low, Tensor up, bool paired) -> Tensor");
}

TORCH_LIBRARY_IMPL(TRUETUNE_LIBRARY, CPU, library) {
  library.impl("int8_quantize", truetune::int8_quantize);
  library.impl("int8_pack", truetune::int8_pack);
  library.impl("int8_product", truetune::int8_product);
}
