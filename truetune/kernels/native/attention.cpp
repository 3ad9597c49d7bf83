// Attention over packed documents for CPUs, after FlashAttention-2 (Dao, arXiv:2307.08691, algorithms 1 and 2).
//
// Scores are made block by block of keys and never kept: the forward pass keeps a running maximum and sum of
// every query, the backward pass makes the scores again from the log-sum-exp. In base 2, with z = scale q k^T:
//   x = log2(e) z            or, with a soft cap c,  x = log2(e) c tanh(z / c)
//   P = 2^(x - L),           L = log2 sum 2^x over the keys that a query sees
//   O = P V,                 D = rowsum(dO * O),   dS = P * (dO V^T - D), times 1 - tanh^2(z / c) with a soft cap
//   dV = P^T dO,             dQ = scale dS K,      dK = scale dS^T Q
// Products are of the inputs' dtype, sums and statistics fp32. Work is shared out as items (a document, a key
// head, a range of its queries or keys), each computed by one thread in one order, and what several items add
// to is added in the items' order: the result does not depend on the number of threads.
// A document may have more keys than queries, which then are those of its last tokens.
// Left out: dropout, sinks, head sizes that are no multiple of 8 or above 256.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "backward.h"
#include "forward.h"

namespace truetune {
namespace {

using at::Tensor;

// Tokens of each document that have a query, and that have a key.
struct Lengths {
  at::IntArrayRef queries, keys;
};

void check_sum(at::IntArrayRef lengths, Index tokens) {
  Index sum = 0;
  for (const Index length : lengths) {
    TORCH_CHECK(length >= 0, "a length is negative");
    sum += length;
  }
  TORCH_CHECK(sum == tokens, "lengths add up to ", sum, ", but there are ", tokens, " tokens");
}

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, Lengths lengths, double scale, Index window,
               double softcap) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k and v have to be [heads, tokens, size]");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k and v differ in dtype");
  const Index heads = q.size(0), key_heads = k.size(0), tokens = q.size(1), size = q.size(2), values = v.size(2);
  TORCH_CHECK(k.size(1) == v.size(1) && v.size(0) == key_heads && k.size(2) == size,
              "q, k and v do not fit together");
  TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, "the key heads do not divide the query heads");
  for (const Index n : {size, values})
    TORCH_CHECK(n > 0 && n % 8 == 0 && n <= LARGEST, "a head size has to be a multiple of 8 up to ", LARGEST);
  check_sum(lengths.queries, tokens);
  check_sum(lengths.keys, k.size(1));
  TORCH_CHECK(lengths.queries.size() == lengths.keys.size(), "there are lengths of other documents");
  for (size_t i = 0; i < lengths.keys.size(); i++)
    TORCH_CHECK(lengths.queries[i] <= lengths.keys[i], "a document has more queries than keys");
  TORCH_CHECK(window > 0, "window has to be positive");
  const Index widest = std::numeric_limits<int32_t>::max() / 2;
  return {heads, key_heads, tokens, size, values, float(scale), std::min(window, widest), float(softcap)};
}

Tensor rows_contiguous(const Tensor& t) { return t.stride(2) == 1 ? t : t.contiguous(); }

// [heads, tokens, size] in memory as [tokens, heads, size], which is how a linear layer reads and writes it.
Tensor by_token(Index heads, Index tokens, Index size, const Tensor& like) {
  return at::empty({tokens, heads, size}, like.options()).transpose(0, 1);
}

// Every document and key head, `range(length)` tokens at a time: those with a query (forward), or all (backward).
template <class Range>
std::vector<Item> items_of(const Shape& shape, Lengths lengths, bool forward, const Range& range) {
  std::vector<Item> items;
  Index start = 0, query = 0;
  for (size_t i = 0; i < lengths.keys.size(); i++) {
    const Index length = lengths.keys[i], before = length - lengths.queries[i];
    for (Index head = 0; head < shape.key_heads; head++)
      for (Index first = forward ? before : 0; first < length; first += range(length))
        items.push_back({start, length, before, query - before, head, first, std::min(length, first + range(length))});
    start += length;
    query += lengths.queries[i];
  }
  return items;
}

template <class E>
void run_forward(const Shape& shape, Lengths lengths, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& out, const Tensor& lse) {
  const Forward<E> forward{shape, Heads<E>(q), Heads<E>(k), Heads<E>(v), Heads<E>(out), lse.data_ptr<float>()};
  const auto items = items_of(shape, lengths, true, [](Index) { return FORWARD_QUERIES; });
  each_item(items, true, forward.bytes(), forward);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             at::IntArrayRef queries, at::IntArrayRef keys, double scale,
                                             Index window, double softcap) {
  const Lengths lengths{queries, keys};
  const Shape shape = shape_of(q, k, v, lengths, scale, window, softcap);
  const Tensor out = by_token(shape.heads, shape.tokens, shape.values, q);
  const Tensor lse = at::empty({shape.heads, shape.tokens}, q.options().dtype(at::kFloat));
  const auto run = q.scalar_type() == at::kFloat ? run_forward<Fp32> : run_forward<Bf16>;
  run(shape, lengths, rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), out, lse);
  return {out, lse};
}

template <class E>
void run_backward(const Shape& shape, Lengths lengths, const std::array<Tensor, 8>& t, const Tensor& lse) {
  const auto range = [](Index length) { return std::max(BACKWARD_KEYS, up((length + PARTS - 1) / PARTS, KEYS)); };
  auto items = items_of(shape, lengths, false, range);
  Backward<E> backward{shape,          Heads<E>(t[0]), Heads<E>(t[1]), Heads<E>(t[2]), Heads<E>(t[3]),
                       Heads<E>(t[4]), Heads<E>(t[5]), Heads<E>(t[6]), Heads<E>(t[7]), lse.data_ptr<float>()};
  Index longest = 0, numbers = 0;
  std::vector<std::pair<Index, Index>> shared;  // items of one document and key head: the first, and how many
  for (Index i = 0; i < Index(items.size()); i++) {
    Item& item = items[i];
    longest = std::max(longest, item.end - item.first);
    if (item.length <= range(item.length)) continue;
    item.alone = false;
    item.part = numbers;
    numbers += shape.group() * backward.query_count(item) * shape.size;
    if (item.first == 0) shared.emplace_back(i, 0);
    shared.back().second++;
  }
  const Tensor parts = at::empty({numbers}, lse.options());
  backward.parts = parts.data_ptr<float>();
  each_item(items, false, backward.bytes(longest), backward);
  const Index group = shape.group();
  at::parallel_for(0, Index(shared.size()) * group, 1, [&](Index begin, Index end) {
    for (Index i = begin; i < end; i++)
      backward.join(&items[shared[i / group].first], shared[i / group].second, i % group);
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      at::IntArrayRef queries, at::IntArrayRef keys, double scale,
                                                      Index window, double softcap) {
  const Lengths lengths{queries, keys};
  const Shape shape = shape_of(q, k, v, lengths, scale, window, softcap);
  TORCH_CHECK(dout.sizes() == out.sizes() && dout.scalar_type() == q.scalar_type(), "the gradient does not fit");
  const Tensor dq = by_token(shape.heads, shape.tokens, shape.size, q);
  const Tensor dk = by_token(shape.key_heads, k.size(1), shape.size, q);
  const Tensor dv = by_token(shape.key_heads, k.size(1), shape.values, q);
  const auto run = q.scalar_type() == at::kFloat ? run_backward<Fp32> : run_backward<Bf16>;
  run(shape, lengths,
      {rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), out, rows_contiguous(dout), dq, dk, dv}, lse);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace truetune

TORCH_LIBRARY(TRUETUNE_LIBRARY, library) {
  library.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, int[] queries, int[] keys, float scale, int window,"
      " float softcap) -> (Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] queries,"
      " int[] keys, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(TRUETUNE_LIBRARY, CPU, library) {
  library.impl("attention_forward", truetune::attention_forward);
  library.impl("attention_backward", truetune::attention_backward);
}
