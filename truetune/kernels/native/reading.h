// Rows of a tensor as vectors of floats, read and written up to their end.

#pragma once

#include <ATen/core/Tensor.h>

#include "tiles.h"

namespace truetune {

// Up to LANES elements as floats; what is missing is 0.
inline Vec read(const float* from, Index count) {
  if (count >= LANES) return load<Vec>(from);
  Vec value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline Vec read(const uint16_t* from, Index count) {
  using Shorts = uint16_t __attribute__((vector_size(BYTES / 2)));
  Shorts value{};
  if (count >= LANES)
    value = load<Shorts>(from);
  else
    std::memcpy(&value, from, count * sizeof(uint16_t));
  return bits<Vec>(__builtin_convertvector(value, Words) << 16);
}

template <class E>
inline void write(typename E::Element* to, const Vec& x, Index count) {
  if (count >= LANES) return E::convert(to, x);
  typename E::Element rounded[LANES];
  E::convert(rounded, x);
  std::memcpy(to, rounded, count * sizeof rounded[0]);
}

template <class T>
T* data(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

}  // namespace truetune
