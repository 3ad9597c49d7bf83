// The forward pass: a running maximum and sum per query (algorithm 1 of arXiv:2307.08691).

#pragma once

#include "items.h"

namespace truetune {

constexpr Index FORWARD_QUERIES = 128;  // of one item: enough to repay the packing of a block of keys

template <class E>
struct Forward {
  Shape shape;
  Heads<E> q, k, v, out;
  float* lse;  // [heads, tokens], base 2

  Index words() const { return shape.size / E::PER_WORD; }
  Index width() const { return up(shape.values, LANES); }

  Index bytes() const {
    const Index rows = shape.group() * FORWARD_QUERIES, slack = 16 * 64;
    const Index numbers = rows * (words() + width() + 1 + LANES) + KEYS * (words() + width() + 2 * ROWS);
    return 4 * numbers + slack;
  }

  // One block of keys for four queries: their scores, and sums and outputs rescaled to the new maximum.
  void attend(const Word* queries, const Word* keys, const Word* values, Columns columns, Index ahead, float* scores,
              Word* weights, float* top, float* sum, float* sums) const {
    const Index first = columns.first, padded = width();
    multiply<E, false>(scores + first, KEYS, {queries, words(), 1}, keys + first, KEYS, words(), columns.count());
    for (Index i = 0; i < ROWS; i++) {
      float* row = scores + i * KEYS;
      Vec maxima = NOTHING - Vec{};
      for (Index c = first; c < columns.end; c += LANES) {
        const Vec x = exponents(shape, load<Vec>(row + c), columns.all, ahead + i - c);
        store(row + c, x);
        maxima = x > maxima ? x : maxima;
      }
      const float before = top[i];
      const Vec high = highest_everywhere(maxima), now = high > before ? high : before - Vec{};
      Vec added{};
      for (Index c = first; c < columns.end; c += LANES) {
        const Vec weight = exp2<E::TERMS>(load<Vec>(row + c) - now);
        E::store_words(weights + i * KEYS / E::PER_WORD, c, weight);
        added += weight;
      }
      const Vec shrink = exp2<E::TERMS>(before - now);
      store(sum + i * LANES, load<Vec>(sum + i * LANES) * shrink + added);
      if (now[0] == before) continue;
      top[i] = now[0];
      for (Index c = 0; c < padded; c += LANES) {
        float* at = sums + i * padded + c;
        store(at, load<Vec>(at) * shrink);
      }
    }
    const Operand seen{weights + first / E::PER_WORD, KEYS / E::PER_WORD, 1};
    const Index steps = columns.count() / E::PER_WORD;
    multiply<E, true>(sums, padded, seen, values + first / E::PER_WORD * padded, padded, steps, padded);
  }

  void operator()(const Item& item, Arena& arena) const {
    const Index count = item.end - item.first, rows = up(count, ROWS), group = shape.group(), padded = width();
    Word* queries = arena.take<Word>(group * rows * words());
    float* sums = arena.take<float>(group * rows * padded);
    float* top = arena.take<float>(group * rows);
    float* sum = arena.take<float>(group * rows * LANES);
    Word* keys = arena.take<Word>(words() * KEYS);
    Word* values = arena.take<Word>(KEYS * padded);
    float* scores = arena.take<float>(ROWS * KEYS);
    Word* weights = arena.take<Word>(ROWS * KEYS);
    std::fill_n(sums, group * rows * padded, 0.0f);
    std::fill_n(top, group * rows, std::numeric_limits<float>::lowest());
    std::fill_n(sum, group * rows * LANES, 0.0f);
    const Index head = item.key_head * group;
    for (Index g = 0; g < group; g++)
      pack_rows<E>(queries + g * rows * words(), q.at(head + g, item.queries + item.first), q.token, count, rows,
                   shape.size);
    for (Index key = down(std::max<Index>(0, item.first - shape.window + 1), KEYS); key < item.end; key += KEYS) {
      const Index there = std::min(KEYS, item.length - key);
      pack_transposed<E>(keys, k.at(item.key_head, item.start + key), k.token, there, shape.size);
      pack_paired<E>(values, v.at(item.key_head, item.start + key), v.token, there, KEYS, shape.values);
      for (Index r = 0; r < group * rows; r += ROWS) {
        const Index query = item.first + r % rows;
        const Columns columns(query, key, shape.window);
        if (columns.empty()) continue;
        attend(queries + r * words(), keys, values, columns, query - key, scores, weights, top + r, sum + r * LANES,
               sums + r * padded);
      }
    }
    for (Index g = 0; g < group; g++)
      for (Index i = 0; i < count; i++) {
        const Index r = g * rows + i, token = item.queries + item.first + i;
        const float whole = total(load<Vec>(sum + r * LANES));
        store_row<E>(out.at(head + g, token), sums + r * padded, 1 / whole, shape.values);
        lse[(head + g) * shape.tokens + token] = top[r] + std::log2(whole);
      }
  }
};

}  // namespace truetune
