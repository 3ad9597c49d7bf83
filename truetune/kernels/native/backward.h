// The backward pass: scores made again from the log-sum-exp (algorithm 2 of arXiv:2307.08691).
//
// An item keeps dK and dV of its keys to itself, for all query heads of their key head. dQ of a document that is
// cut into several items is left in parts, which are added at the end.

#pragma once

#include "items.h"

namespace truetune {

constexpr Index BACKWARD_QUERIES = KEYS;  // of one block
constexpr Index BACKWARD_KEYS = 512;  // of one item, at least
constexpr Index PARTS = 4;  // of a document's dQ, at most: each takes memory of its size

template <class E>
struct Backward {
  Shape shape;
  Heads<E> q, k, v, out, dout, dq, dk, dv;
  const float* lse;
  float* parts;  // of dQ, where several items add to it: [group, queries, size] per item

  static constexpr Index QUERIES = BACKWARD_QUERIES;

  Index words() const { return shape.size / E::PER_WORD; }
  Index value_words() const { return shape.values / E::PER_WORD; }
  Index width() const { return up(shape.size, LANES); }
  Index value_width() const { return up(shape.values, LANES); }
  // The queries that see a key of an item.
  Index first_query(const Item& item) const { return std::min(last_query(item), std::max(item.first, item.before)); }
  Index last_query(const Item& item) const { return std::min(item.length, item.end - 1 + shape.window); }
  Index query_count(const Item& item) const { return last_query(item) - first_query(item); }

  Index bytes(Index longest) const {
    const Index both = width() + value_width(), slack = 32 * 64;
    const Index keys = up(longest, KEYS) * (3 * width() + 2 * value_width());
    return 4 * (keys + QUERIES * (2 * both + value_width() + width() + 2 + 2 * KEYS) + 3 * ROWS * KEYS) + slack;
  }

  struct Keys {  // of an item, in blocks
    Word *transposed, *values_transposed, *paired;
    float *dk, *dv;
  };
  struct Queries {  // of a block, for one head
    Word *rows, *dout_rows, *paired, *dout_paired, *out;
    float *lse, *D, *dq;
  };
  struct Scratch {  // P and dS of a block of queries and a block of keys
    float *scores, *dweights;  // of four queries
    Word *weights, *dscores;  // paired along the queries
    Word* dscores_rows;  // of four queries
  };

  Keys pack_keys(const Item& item, Arena& arena) const {
    const Index padded = up(item.end - item.first, KEYS);
    Keys keys{arena.take<Word>(padded * words()), arena.take<Word>(padded * value_words()),
              arena.take<Word>(padded / E::PER_WORD * width()), arena.take<float>(padded * width()),
              arena.take<float>(padded * value_width())};
    std::fill_n(keys.dk, padded * width(), 0.0f);
    std::fill_n(keys.dv, padded * value_width(), 0.0f);
    for (Index block = 0; block < padded; block += KEYS) {
      const Index token = item.start + item.first + block, there = std::min(KEYS, item.end - item.first - block);
      const auto *key = k.at(item.key_head, token), *value = v.at(item.key_head, token);
      pack_transposed<E>(keys.transposed + block * words(), key, k.token, there, shape.size);
      pack_transposed<E>(keys.values_transposed + block * value_words(), value, v.token, there, shape.values);
      pack_paired<E>(keys.paired + block / E::PER_WORD * width(), key, k.token, there, KEYS, shape.size);
    }
    return keys;
  }

  // Queries past the document's end are zeros with L = 0, so that they add nothing anywhere.
  void pack_queries(const Queries& to, Index head, Index token, Index count, Index rows) const {
    const auto *query = q.at(head, token), *gradient = dout.at(head, token);
    pack_rows<E>(to.rows, query, q.token, count, rows, shape.size);
    pack_rows<E>(to.dout_rows, gradient, dout.token, count, rows, shape.values);
    pack_paired<E>(to.paired, query, q.token, count, rows, shape.size);
    pack_paired<E>(to.dout_paired, gradient, dout.token, count, rows, shape.values);
    std::fill_n(to.dq, rows * width(), 0.0f);
    std::fill_n(to.lse, rows, 0.0f);
    std::copy_n(lse + head * shape.tokens + token, count, to.lse);
    // D by the very product that makes dO V^T: a query that sees one key has no gradient, not a rounding error's.
    pack_transposed<E>(to.out, out.at(head, token), out.token, count, shape.values);
    for (Index r = 0; r < rows; r += ROWS) {
      float squares[ROWS * LANES];
      const Index first = down(r, LANES);
      multiply<E, false>(squares, LANES, {to.dout_rows + r * value_words(), value_words(), 1}, to.out + first, KEYS,
                         value_words(), LANES);
      for (Index i = 0; i < ROWS; i++) to.D[r + i] = squares[i * LANES + r + i - first];
    }
  }

  // P and dS of four queries from their scores and dO V^T. r: their first row in the block.
  void weigh(const Queries& queries, const Scratch& s, Columns columns, Index r, Index ahead) const {
    for (Index c = columns.first; c < columns.end; c += LANES) {
      Vec p[ROWS], ds[ROWS];
      for (Index i = 0; i < ROWS; i++) {
        Vec slope;
        const Vec x = exponents(shape, load<Vec>(s.scores + i * KEYS + c), columns.all, ahead + i - c, &slope);
        p[i] = exp2<E::TERMS>(x - queries.lse[r + i]);
        ds[i] = p[i] * (load<Vec>(s.dweights + i * KEYS + c) - queries.D[r + i]);
        if (shape.softcap != 0) ds[i] *= slope;
        E::store_words(s.dscores_rows + i * KEYS / E::PER_WORD, c, ds[i]);
      }
      for (Index i = 0; i < ROWS; i += 2) {
        const Index at = (r + i) / E::PER_WORD * KEYS + c;
        E::store_pair(s.weights + at, KEYS, p[i], p[i + 1]);
        E::store_pair(s.dscores + at, KEYS, ds[i], ds[i + 1]);
      }
    }
  }

  // A block of queries (from `query`, `rows` of them) with a block of keys (from `key`, the `block`-th of the item).
  void attend(const Queries& queries, const Keys& keys, const Scratch& s, Index query, Index rows, Index key,
              Index block) const {
    const Index window = shape.window;
    for (Index r = 0; r < rows; r += ROWS) {
      const Columns columns(query + r, key, window);
      if (columns.empty()) continue;
      const Index first = columns.first, count = columns.count();
      const Word* transposed = keys.transposed + block * words() + first;
      const Word* values = keys.values_transposed + block * value_words() + first;
      const Operand query_rows{queries.rows + r * words(), words(), 1};
      const Operand dout_rows{queries.dout_rows + r * value_words(), value_words(), 1};
      multiply<E, false>(s.scores + first, KEYS, query_rows, transposed, KEYS, words(), count);
      multiply<E, false>(s.dweights + first, KEYS, dout_rows, values, KEYS, value_words(), count);
      weigh(queries, s, columns, r, query + r - key);
      const Operand dscores{s.dscores_rows + first / E::PER_WORD, KEYS / E::PER_WORD, 1};
      const Word* paired = keys.paired + (block + first) / E::PER_WORD * width();
      multiply<E, true>(queries.dq + r * width(), width(), dscores, paired, width(), count / E::PER_WORD, width());
    }
    for (Index c = 0; c < KEYS; c += ROWS) {
      // The rows in which the vector of columns around c was computed: the converse of Columns.
      const Index vector = key + down(c, LANES);
      const Index first = down(std::max<Index>(0, vector - query), ROWS);
      const Index end = std::min(rows, up(std::max<Index>(0, window + vector + LANES - 1 - query), ROWS));
      if (first >= end) continue;
      const Index from = first / E::PER_WORD, steps = (end - first) / E::PER_WORD;
      const Operand weights{s.weights + from * KEYS + c, 1, KEYS}, dscores{s.dscores + from * KEYS + c, 1, KEYS};
      multiply<E, true>(keys.dv + (block + c) * value_width(), value_width(), weights,
                        queries.dout_paired + from * value_width(), value_width(), steps, value_width());
      multiply<E, true>(keys.dk + (block + c) * width(), width(), dscores, queries.paired + from * width(), width(),
                        steps, width());
    }
  }

  void operator()(const Item& item, Arena& arena) const {
    const Keys keys = pack_keys(item, arena);
    const Queries queries{arena.take<Word>(QUERIES * words()),       arena.take<Word>(QUERIES * value_words()),
                          arena.take<Word>(QUERIES * width()),       arena.take<Word>(QUERIES * value_width()),
                          arena.take<Word>(QUERIES * value_words()), arena.take<float>(QUERIES),
                          arena.take<float>(QUERIES),                arena.take<float>(QUERIES * width())};
    const Scratch scratch{arena.take<float>(ROWS * KEYS), arena.take<float>(ROWS * KEYS),
                          arena.take<Word>(QUERIES * KEYS), arena.take<Word>(QUERIES * KEYS),
                          arena.take<Word>(ROWS * KEYS)};
    const Index group = shape.group(), last = last_query(item);
    for (Index g = 0; g < group; g++) {
      const Index head = item.key_head * group + g;
      for (Index query = first_query(item); query < last; query += QUERIES) {
        const Index count = std::min(QUERIES, last - query), rows = up(count, ROWS);
        pack_queries(queries, head, item.queries + query, count, rows);
        const Index behind = std::max<Index>(0, query - shape.window + 1 - item.first);
        for (Index block = down(behind, KEYS); item.first + block < std::min(item.end, query + rows); block += KEYS)
          attend(queries, keys, scratch, query, rows, item.first + block, block);
        for (Index i = 0; i < count; i++) {
          const float* row = queries.dq + i * width();
          if (item.alone) {
            store_row<E>(dq.at(head, item.queries + query + i), row, shape.scale, shape.size);
          } else {
            const Index place = g * query_count(item) + query - first_query(item) + i;
            std::copy_n(row, shape.size, parts + item.part + place * shape.size);
          }
        }
      }
    }
    for (Index i = 0; i < item.end - item.first; i++) {
      const Index token = item.start + item.first + i;
      store_row<E>(dk.at(item.key_head, token), keys.dk + i * width(), shape.scale, shape.size);
      store_row<E>(dv.at(item.key_head, token), keys.dv + i * value_width(), 1, shape.values);
    }
  }

  // dQ of one head of a document from the parts that its `count` items left.
  void join(const Item* items, Index count, Index g) const {
    for (Index query = items->before; query < items->length; query++) {
      float sum[LARGEST + LANES] = {};
      for (const Item* item = items; item != items + count; item++) {
        const Index first = first_query(*item);
        if (query < first || query >= last_query(*item)) continue;
        const float* part = parts + item->part + (g * query_count(*item) + query - first) * shape.size;
        for (Index c = 0; c < shape.size; c++) sum[c] += part[c];
      }
      const Index head = items->key_head * shape.group() + g;
      store_row<E>(dq.at(head, items->queries + query), sum, shape.scale, shape.size);
    }
  }
};

}  // namespace truetune
