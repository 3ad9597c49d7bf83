// Cross-entropy of rows of logits, and its gradient in their place.
//
//   z = scale x     or, with a soft cap c,  z = c tanh(scale x / c),  z' = scale (1 - (z / c)^2), else z' = scale
//   loss = log sum exp z - z[label]        dx = weight (softmax(z) - [label]) z'
// A row is computed by one thread, in fp32, and its gradient rounded once. Sums of exponentials are made of short sums,
// so that their error does not grow with the vocabulary. On the way it can be noted which classes have a softmax(z) of at
// least a threshold in any row whose label is another, or one that is no number.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <vector>

#include "reading.h"

namespace truetune {
namespace {

using at::Tensor;

constexpr int EXACT = Fp32::TERMS;  // of 2^x, whatever the logits' dtype: the loss is fp32
constexpr Index SHORT = 64 * LANES;  // elements of one short sum

using Flags = int8_t __attribute__((vector_size(LANES)));

struct Logit {
  float scale, softcap;  // 0: none

  Vec operator()(const Vec& x, Vec* slope = nullptr) const {
    if (softcap == 0) {
      if (slope) *slope = scale - Vec{};
      return x * scale;
    }
    const Vec t = tanh(x * (scale / softcap));
    if (slope) *slope = scale * (1.0f - t * t);
    return t * softcap;
  }
  float of(float x) const { return (*this)(x - Vec{})[0]; }
};

// The largest logit, that of the label left out: lanes beyond the row do not count.
template <class T>
float highest_rival(const T* row, Index size, Index label, const Logit& logit) {
  constexpr int32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec largest = NOTHING - Vec{}, broken{};
  for (Index i = 0; i < size; i += LANES) {
    const Vec z = logit(read(row + i, size - i));
    const Ints lane = load<Ints>(LANE) + static_cast<int32_t>(i);
    broken = z == z ? broken : z;
    largest = (lane != static_cast<int32_t>(label)) & (lane < static_cast<int32_t>(size)) & (z > largest) ? z : largest;
  }
  const float sum = total(broken);  // not a number if any logit is none
  return sum == sum ? highest(largest) : sum;
}

// reached: a flag for each class, up to whole vectors, that is set where the class reaches the threshold; or null.
template <class E>
void row_loss(typename E::Element* row, Index size, Index label, float weight, const Logit& logit, bool gradient,
              float* loss, bool* correct, int8_t* reached, float threshold) {
  const float own = logit.of(read(row + label, 1)[0]);
  const float rival = highest_rival(row, size, label, logit), top = own > rival ? own : rival;
  double sum = 0;
  for (Index first = 0; first < size; first += SHORT) {
    const Index last = std::min(size, first + SHORT);
    Vec part{};
    Index i = first;
    for (; i + LANES <= last; i += LANES) part += exp2<EXACT>((logit(read(row + i, LANES)) - top) * LOG2E);
    float few = 0;
    for (; i < last; i++) few += std::exp(logit.of(read(row + i, 1)[0]) - top);
    sum += total(part) + few;
  }
  const float more = static_cast<float>(std::log(sum));
  *loss = (top - own) + more;
  *correct = own > rival;
  if (!gradient) return;
  if (*loss != *loss) weight = *loss;  // exp2 would make a number of it
  for (Index i = 0; i < size; i += LANES) {
    Vec slope;
    const Vec z = logit(read(row + i, size - i), &slope);
    Vec d = exp2<EXACT>((z - top - more) * LOG2E);
    if (label >= i && label < i + LANES) d[label - i] = std::expm1(-*loss);
    if (reached) {
      const Ints enough = ~(d < threshold);
      store(reached + i, load<Flags>(reached + i) | __builtin_convertvector(enough, Flags));
    }
    write<E>(row + i, d * slope * weight, size - i);
  }
}

void cross_entropy(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& weights,
                   const Tensor& losses, const Tensor& correct, double scale, double softcap, bool gradient,
                   const std::optional<Tensor>& reached, double threshold) {
  const bool single = logits.scalar_type() == at::kFloat;
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && (single || logits.scalar_type() == at::kBFloat16),
              "logits have to be [rows, classes], contiguous, float or bfloat16");
  const Index rows = logits.size(0), size = logits.size(1);
  for (const Tensor& t : {labels, weights.value_or(labels), losses, correct})
    TORCH_CHECK(t.dim() == 1 && t.size(0) == rows && t.is_contiguous(), "one label, weight, loss and hit for each row");
  TORCH_CHECK(labels.scalar_type() == at::kLong && losses.scalar_type() == at::kFloat &&
                  correct.scalar_type() == at::kBool && (!weights || weights->scalar_type() == at::kFloat),
              "labels have to be int64, weights and losses float, hits bool");
  TORCH_CHECK(!reached || (reached->scalar_type() == at::kBool && reached->numel() == size && reached->is_contiguous()),
              "one bool for each class");
  const Index* label = labels.data_ptr<Index>();
  for (Index i = 0; i < rows; i++)
    TORCH_CHECK_INDEX(label[i] >= 0 && label[i] < size, "label ", label[i], " is none of ", size, " classes");
  const Logit logit{float(scale), float(softcap)};
  const float least = float(threshold);
  bool* any = reached ? reached->data_ptr<bool>() : nullptr;
  if (any) std::fill_n(any, size, false);
  std::mutex joining;
  at::parallel_for(0, rows, 1, [&](Index begin, Index end) {
    std::vector<int8_t> own(any ? up(size, LANES) : 0);
    int8_t* flags = any ? own.data() : nullptr;
    for (Index i = begin; i < end; i++) {
      const float weight = weights ? weights->data_ptr<float>()[i] : 1.0f;
      float* loss = losses.data_ptr<float>() + i;
      bool* hit = correct.data_ptr<bool>() + i;
      if (single)
        row_loss<Fp32>(data<float>(logits) + i * size, size, label[i], weight, logit, gradient, loss, hit, flags, least);
      else
        row_loss<Bf16>(data<uint16_t>(logits) + i * size, size, label[i], weight, logit, gradient, loss, hit, flags,
                       least);
    }
    if (!any) return;
    const std::lock_guard<std::mutex> lock(joining);
    for (Index j = 0; j < size; j++) any[j] |= own[j] != 0;
  });
}

}  // namespace
}  // namespace truetune

TORCH_LIBRARY_FRAGMENT(TRUETUNE_LIBRARY, library) {
  library.def("cross_entropy(Tensor(a!) logits, Tensor labels, Tensor? weights, Tensor(b!) losses, Tensor(c!) correct,"
              " float scale, float softcap, bool gradient, Tensor(d!)? reached, float threshold) -> ()");
}

TORCH_LIBRARY_IMPL(TRUETUNE_LIBRARY, CPU, library) { library.impl("cross_entropy", truetune::cross_entropy); }
