// What stands between the products of a layer: RMS norms, rotary positions and gated activations.
//
//   s = x + residual,  y = s r (w + offset),  r = 1 / sqrt(mean s^2 + eps)
//     dx = r (g - s r mean(g s r)) + ds,  g = dy (w + offset),  dw = sum over rows of dy s r
//   a' = a cos_1 - b sin_1,  b' = b cos_2 + a sin_2;  back  da = da' cos_1 + db' sin_2,  db = db' cos_2 - da' sin_1
//   h = act(gate) up,  act(x) = x / (1 + 2^-u):  u = log2(e) x (SiLU),  u = 2 log2(e) c (x + 0.044715 x^3) (GELU, tanh)
//     dup = dh act(gate),  dgate = dh up (S + x S (1 - S) u' / log2(e)),  S = 1 / (1 + 2^-u)
// Everything is read once, computed in fp32 and rounded once. Rows are shared out in blocks of a fixed size, and what
// is added up over rows is added block by block in their order: the result does not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "reading.h"

namespace truetune {
namespace {

using at::Tensor;

constexpr Index BLOCK = 32;           // rows that one thread takes, and whose sums stand together
constexpr Index ELEMENTS = 1 << 14;  // the same where there are no rows

// work(first, last) over `count` things, `block` at a time.
template <class Work>
void each_block(Index count, Index block, const Work& work) {
  at::parallel_for(0, (count + block - 1) / block, 1, [&](Index begin, Index end) {
    for (Index i = begin; i < end; i++) work(i * block, std::min(count, (i + 1) * block));
  });
}

void check(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK(t.is_contiguous() && t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(), name,
              " has to be contiguous, and like the first tensor");
}

Index width(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x has to be [rows, width], contiguous");
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.is_contiguous() && weight.numel() == x.size(1),
              "the weight has to be float [width]");
  return x.size(1);
}

template <class E>
void norm(const Tensor& x, const Tensor& weight, const Tensor& residual, float eps, float offset, const Tensor& y,
          const Tensor& sum, const Tensor& scales) {
  using T = typename E::Element;
  const Index size = x.size(1);
  const float* w = data<float>(weight);
  each_block(x.size(0), BLOCK, [&](Index first, Index last) {
    for (Index row = first; row < last; row++) {
      const T* s = data<T>(x) + row * size;
      if (residual.defined()) {
        const T* other = data<T>(residual) + row * size;
        T* to = data<T>(sum) + row * size;
        for (Index i = 0; i < size; i += LANES)
          write<E>(to + i, read(s + i, size - i) + read(other + i, size - i), size - i);
        s = to;
      }
      Vec squares{};
      for (Index i = 0; i < size; i += LANES) {
        const Vec v = read(s + i, size - i);
        squares += v * v;
      }
      const float scale = 1.0f / std::sqrt(total(squares) / size + eps);
      data<float>(scales)[row] = scale;
      T* to = data<T>(y) + row * size;
      for (Index i = 0; i < size; i += LANES)
        write<E>(to + i, read(s + i, size - i) * scale * (read(w + i, size - i) + offset), size - i);
    }
  });
}

// y, s (x itself without a residual), r [rows].
std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const Tensor& weight,
                                                    const std::optional<Tensor>& residual, double eps, double offset) {
  width(x, weight);
  const Tensor other = residual.value_or(Tensor());
  if (other.defined()) check(other, x, "the residual");
  const Tensor y = at::empty_like(x), sum = other.defined() ? at::empty_like(x) : x;
  const Tensor scales = at::empty({x.size(0)}, weight.options());
  (x.scalar_type() == at::kFloat ? norm<Fp32> : norm<Bf16>)(x, weight, other, eps, offset, y, sum, scales);
  return {y, sum, scales};
}

template <class E>
void norm_back(const Tensor& dy, const Tensor& dsum, const Tensor& s, const Tensor& scales, const Tensor& weight,
               float offset, const Tensor& dx, const Tensor& parts) {
  using T = typename E::Element;
  const Index size = s.size(1);
  const float* w = data<float>(weight);
  each_block(s.size(0), BLOCK, [&](Index first, Index last) {
    float* part = parts.defined() ? data<float>(parts) + first / BLOCK * size : nullptr;
    if (part) std::fill_n(part, size, 0.0f);
    for (Index row = first; row < last; row++) {
      const T *x = data<T>(s) + row * size, *g = data<T>(dy) + row * size;
      const T* more = dsum.defined() ? data<T>(dsum) + row * size : nullptr;
      const float scale = data<float>(scales)[row];
      Vec products{};
      for (Index i = 0; i < size; i += LANES) {
        const Index left = size - i;
        const Vec v = read(x + i, left), given = read(g + i, left);
        products += given * (read(w + i, left) + offset) * v;
        if (part) {
          Vec added = read(part + i, left) + given * v * scale;
          std::memcpy(part + i, &added, std::min(left, LANES) * sizeof(float));
        }
      }
      const float mean = total(products) / size * scale * scale * scale;
      T* to = data<T>(dx) + row * size;
      for (Index i = 0; i < size; i += LANES) {
        const Index left = size - i;
        Vec d = read(g + i, left) * (read(w + i, left) + offset) * scale - read(x + i, left) * mean;
        if (more) d += read(more + i, left);
        write<E>(to + i, d, left);
      }
    }
  });
}

// dx, and dw as sums over blocks of rows [blocks, width], without any unless it is wanted.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& s,
                                             const Tensor& scales, const Tensor& weight, double offset, bool wanted) {
  const Index size = width(s, weight);
  check(dy, s, "the gradient of y");
  const Tensor more = dsum.value_or(Tensor());
  if (more.defined()) check(more, s, "the gradient of s");
  const Tensor dx = at::empty_like(s);
  const Tensor parts = at::empty({wanted ? (s.size(0) + BLOCK - 1) / BLOCK : 0, size}, weight.options());
  (s.scalar_type() == at::kFloat ? norm_back<Fp32> : norm_back<Bf16>)(dy, more, s, scales, weight, offset, dx,
                                                                     wanted ? parts : Tensor());
  return {dx, parts};
}

// Of one token's heads: `pairs` pairs (i, i + pairs) are turned, or turned back, the rest is copied.
template <class E, bool BACK>
void turn(const Tensor& x, const Tensor& to, const float* cosine, const float* sine, Index pairs, Index token) {
  using T = typename E::Element;
  const Index size = x.size(2);
  for (Index head = 0; head < x.size(0); head++) {
    const T* from = data<T>(x) + head * x.stride(0) + token * x.stride(1);
    T* out = data<T>(to) + head * to.stride(0) + token * to.stride(1);
    for (Index i = 0; i < pairs; i += LANES) {
      const Index left = pairs - i;
      const Vec a = read(from + i, left), b = read(from + pairs + i, left);
      const Vec c1 = read(cosine + i, left), c2 = read(cosine + pairs + i, left);
      const Vec s1 = read(sine + i, left), s2 = read(sine + pairs + i, left);
      write<E>(out + i, BACK ? a * c1 + b * s2 : a * c1 - b * s1, left);
      write<E>(out + pairs + i, BACK ? b * c2 - a * s1 : b * c2 + a * s2, left);
    }
    std::copy(from + 2 * pairs, from + size, out + 2 * pairs);
  }
}

// x [heads, tokens, size], cosine and sine [tokens, 2 pairs] -> the same in memory as [tokens, heads, size].
Tensor rope(const Tensor& x, const Tensor& cosine, const Tensor& sine, bool back) {
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "x has to be [heads, tokens, size], its rows contiguous");
  for (const Tensor& table : {cosine, sine})
    TORCH_CHECK(table.scalar_type() == at::kFloat && table.is_contiguous() && table.dim() == 2 &&
                    table.size(0) == x.size(1) && table.size(1) % 2 == 0 && table.size(1) <= x.size(2),
                "cosine and sine have to be float [tokens, 2 pairs]");
  const Tensor to = at::empty({x.size(1), x.size(0), x.size(2)}, x.options()).transpose(0, 1);
  const Index width = cosine.size(1);
  const bool single = x.scalar_type() == at::kFloat;
  const auto work = back ? (single ? turn<Fp32, true> : turn<Bf16, true>)
                         : (single ? turn<Fp32, false> : turn<Bf16, false>);
  each_block(x.size(1), BLOCK, [&](Index first, Index last) {
    for (Index token = first; token < last; token++)
      work(x, to, data<float>(cosine) + token * width, data<float>(sine) + token * width, width / 2, token);
  });
  return to;
}

inline Vec within(const Vec& x, float bound) {
  const Vec above = x > -bound ? x : -bound - Vec{};
  return above < bound ? above : bound - Vec{};
}

// act(x), and its slope. Beyond the bounds S is 0 or 1 in any case.
template <int TERMS>
inline Vec activate(const Vec& x, bool tanh, Vec* slope) {
  constexpr float C = 0.797884560802865355880f, CUBE = 0.044715f;  // sqrt(2 / pi)
  const Vec near = tanh ? within(x, 32) : x;
  const Vec u = tanh ? 2 * LOG2E * C * (near + CUBE * near * near * near) : LOG2E * x;
  const Vec s = u < -126.0f ? Vec{} : 1.0f / (1.0f + exp2<TERMS>(-within(u, 126)));
  if (slope) *slope = s + near * s * (1.0f - s) * (tanh ? 2 * C * (1.0f + 3 * CUBE * near * near) : 1.0f - Vec{});
  return x == x ? x * s : x;
}

template <class E>
void gate_up(const Tensor& gate, const Tensor& up, bool tanh, const Tensor& out) {
  using T = typename E::Element;
  const T *gates = data<T>(gate), *ups = data<T>(up);
  T* to = data<T>(out);
  each_block(gate.numel(), ELEMENTS, [=](Index first, Index last) {
    for (Index i = first; i < last; i += LANES) {
      const Vec act = activate<E::TERMS>(read(gates + i, last - i), tanh, nullptr);
      write<E>(to + i, act * read(ups + i, last - i), last - i);
    }
  });
}

Tensor gated_forward(const Tensor& gate, const Tensor& up, bool tanh) {
  check(gate, gate, "the gate");
  check(up, gate, "up");
  const Tensor out = at::empty_like(gate);
  (gate.scalar_type() == at::kFloat ? gate_up<Fp32> : gate_up<Bf16>)(gate, up, tanh, out);
  return out;
}

template <class E>
void gate_up_back(const Tensor& dout, const Tensor& gate, const Tensor& up, bool tanh, const Tensor& dgate,
                  const Tensor& dup) {
  using T = typename E::Element;
  const T *gates = data<T>(gate), *ups = data<T>(up), *given = data<T>(dout);
  T *to_gate = data<T>(dgate), *to_up = data<T>(dup);
  each_block(gate.numel(), ELEMENTS, [=](Index first, Index last) {
    for (Index i = first; i < last; i += LANES) {
      const Index left = last - i;
      Vec slope;
      const Vec d = read(given + i, left), act = activate<E::TERMS>(read(gates + i, left), tanh, &slope);
      write<E>(to_gate + i, d * read(ups + i, left) * slope, left);
      write<E>(to_up + i, d * act, left);
    }
  });
}

std::tuple<Tensor, Tensor> gated_backward(const Tensor& dout, const Tensor& gate, const Tensor& up, bool tanh) {
  check(gate, gate, "the gate");
  check(up, gate, "up");
  check(dout, gate, "the gradient");
  const Tensor dgate = at::empty_like(gate), dup = at::empty_like(gate);
  (gate.scalar_type() == at::kFloat ? gate_up_back<Fp32> : gate_up_back<Bf16>)(dout, gate, up, tanh, dgate, dup);
  return {dgate, dup};
}

}  // namespace
}  // namespace truetune

TORCH_LIBRARY_FRAGMENT(TRUETUNE_LIBRARY, library) {
  library.def("rms_norm_forward(Tensor x, Tensor weight, Tensor? residual, float eps, float offset)"
              " -> (Tensor, Tensor, Tensor)");
  library.def("rms_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor scales, Tensor weight, float offset,"
              " bool wanted) -> (Tensor, Tensor)");
  library.def("rope(Tensor x, Tensor cosine, Tensor sine, bool back) -> Tensor");
  library.def("gated_forward(Tensor gate, Tensor up, bool tanh) -> Tensor");
  library.def("gated_backward(Tensor dout, Tensor gate, Tensor up, bool tanh) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(TRUETUNE_LIBRARY, CPU, library) {
  library.impl("rms_norm_forward", truetune::rms_norm_forward);
  library.impl("rms_norm_backward", truetune::rms_norm_backward);
  library.impl("rope", truetune::rope);
  library.impl("gated_forward", truetune::gated_forward);
  library.impl("gated_backward", truetune::gated_backward);
}
