// What forward and backward share: shapes, strided tensors, items of work, and which key a query sees.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "tiles.h"

namespace truetune {

struct Shape {
  Index heads, key_heads, tokens, size, values;  // tokens that have a query; size of a query head, of a value head
  float scale;
  Index window;
  float softcap;  // 0: none

  Index group() const { return heads / key_heads; }
};

// A tensor [heads, tokens, size] whose last dimension is contiguous.
template <class E>
struct Heads {
  typename E::Element* first;
  Index head, token;  // elements between neighbours

  explicit Heads(const at::Tensor& t)
      : first(static_cast<typename E::Element*>(t.data_ptr())), head(t.stride(0)), token(t.stride(1)) {}

  typename E::Element* at(Index h, Index t) const { return first + h * head + t * token; }
};

// Tokens are counted from the document's start. All have a key, those from `before` on a query.
struct Item {
  Index start, length, before;  // start: of the document among the keys
  Index queries;  // where the document's first token stands, or would stand, among the queries
  Index key_head;
  Index first, end;  // its queries (forward) or keys (backward)
  Index part = 0;  // backward: where its part of dQ begins, if the document has several
  bool alone = true;  // backward: the document has one item per key head

  // The pairs of a query and a key, which the time is proportional to, but for the window.
  double pairs(bool forward) const {
    const double n = end - first;
    return n * (forward ? first + n / 2 : length - std::max(double(before), first + n / 2));
  }
};

// Runs work(item, arena) for every item, longest first, by whichever thread is free.
template <class Work>
void each_item(const std::vector<Item>& items, bool forward, Index bytes, const Work& work) {
  std::vector<Index> order(items.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    return items[a].pairs(forward) > items[b].pairs(forward);
  });
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](Index, Index) {
    Arena arena(bytes);
    for (size_t i = next++; i < order.size(); i = next++) {
      arena.clear();
      work(items[order[i]], arena);
    }
  });
}

// The columns of a block of keys that any of four queries sees, widened to whole vectors.
struct Columns {
  Index first, end;
  bool all;  // every query sees every one of them

  Columns(Index query, Index key, Index window)
      : first(down(std::max<Index>(0, query - window + 1 - key), LANES)),
        end(std::min(KEYS, up(std::max<Index>(0, query + ROWS - key), LANES))),
        all(key + end - 1 <= query && query + ROWS - 1 - key - first < window) {}

  bool empty() const { return first >= end; }
  Index count() const { return end - first; }
};

// x of LANES scores of one query, -inf for keys that it does not see. ahead: query minus the first of the keys.
inline Vec exponents(const Shape& s, const Vec& products, bool all, Index ahead, Vec* slope = nullptr) {
  Vec x;
  if (s.softcap == 0) {
    x = products * (s.scale * LOG2E);
  } else {
    const Vec t = tanh(products * (s.scale / s.softcap));
    if (slope) *slope = 1.0f - t * t;
    x = t * (s.softcap * LOG2E);
  }
  if (all) return x;
  constexpr int32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Ints distance = static_cast<int32_t>(ahead) - load<Ints>(LANE);
  return (distance >= 0) & (distance < static_cast<int32_t>(s.window)) ? x : NOTHING - Vec{};
}

}  // namespace truetune
