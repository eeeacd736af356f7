// nmf with the products of matmul.h, forward, of x whose channels are innermost in memory. Derived::Part multiplies a part of x
// with the factors:
//
//   Part(derived, image, first row of x^T, rows)
//   project(num)                 num [rows][padded] <- x^T B
//   add_products(c, sums, add)   sums [padded][D] (+)= C^T x^T
//   multiply(c, y)               y^T rows <- C B^T, or its projection
//
// after Derived::pack_bases(step) and, for multiply, pack_transposed() have made B, or left(), an operand. A part has at most
// part_rows().
#pragma once
#include "cpu/matmul.h"
#include "cpu/nmf.h"

namespace segnext {

template <class Derived>
class NmfOnTiles : public Nmf<float> {
 public:
  using Nmf<float>::Nmf;

  static bool serves(const Matrices& x) { return x.transposed && x.rows % kPanel == 0 && x.columns % kPanel == 0; }

  void run(const void* bases, const Matrices* y = nullptr, const float* projection = nullptr) {
    begin(bases);
    self().pack_bases(0);
    for (int64_t step = 0; step < steps_; ++step) {
      update_coefficients(step, Then::kSum);
      update_bases(step, [&](int64_t image, int64_t first, int64_t rows, float* sums) -> const float* {
        Buffer<float> whole(s_.padded * rows);
        sum_products(image, first, rows, whole);
        transpose_rows<float>(whole, rows, s_.padded, rows, sums, s_.padded);
        return sums;
      });
      self().pack_bases(step + 1);
    }
    project(projection);
    if (y != nullptr) self().pack_transposed();
    update_coefficients(steps_, y != nullptr ? Then::kMultiply : Then::kNothing, y);
  }

 private:
  Derived& self() { return static_cast<Derived&>(*this); }

  // As the base's.
  void update_coefficients(int64_t step, Then then, const Matrices* y = nullptr) {
    const Order order = step % 2 == 0 ? Order::kForward : Order::kBackward;  // what was read last is in the caches
    parallel_({x_.batch * s_.chunks, 1, order}, [&](Share& items) {
      const int64_t R = s_.padded, most = self().part_rows();
      Buffer<float> num(most * R), den(most * R);
      for (const int64_t item : items) {
        const int64_t image = item / s_.chunks, start = item % s_.chunks * s_.chunk, stop = std::min(start + s_.chunk, s_.N);
        for (int64_t first = start; first < stop; first += most) {
          const int64_t count = std::min(most, stop - first);
          typename Derived::Part part(self(), image, first, count);
          float *before = coefficients(step, image, first), *after = coefficients(step + 1, image, first);
          part.project(num);
          if (step == 0) {
            std::memcpy(before, num, sizeof(float) * count * R);
            softmax_rows<float>(s_, before, count);
          }
          gemm<float>({before, R, 1}, count, s_.rank, bb(image), R, s_.vectors, den, R, false);
          scale(before, num, den, count * R, after, c_ratio(step, image, first));
          if (then == Then::kMultiply) {
            part.multiply(after, *y);
          } else if (then == Then::kSum) {
            add_to_cc(after, after, count, item, first > start);
            part.add_products(after, xc_ + item * s_.D * R, first > start);
          }
        }
      }
    });
  }

  // out [padded][rows] <- the sum over the chunks of rows of x C, transposed
  void sum_products(int64_t image, int64_t first, int64_t rows, float* out) const {
    for (int64_t r = 0; r < s_.padded; ++r) {
      for (int64_t d = 0; d < rows; d += L) {
        const float* from = xc_ + image * s_.chunks * s_.D * s_.padded + r * s_.D + first + d;
        Vector<float> sum = load<float>(from);
        for (int64_t part = 1; part < s_.chunks; ++part) sum += load<float>(from + part * s_.D * s_.padded);
        store<float>(out + r * rows + d, sum);
      }
    }
  }
};

}  // namespace segnext
