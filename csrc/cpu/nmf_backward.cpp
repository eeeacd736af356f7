// nmf backward: takes the factors and ratios of every step that forward has left, or runs forward again, then goes back through
// the steps, one pass over x each. It holds dP and dU of every step, (steps + 1) N R + steps D R accumulators per matrix.
//
// C' = C P / Q with P = x^T B, Q = C B^T B + eps:
//   dP = dC' C / Q,  dQ = -dC' C' / Q,  dC = dC' P / Q + dQ S,  dB += x dP + B (dS + dS^T) with S = B^T B, dS = C^T dQ
// B' = B U / W with U = x C, W = B C^T C + eps:
//   dU = dB' B / W,  dW = -dB' B' / W,  dB = dB' U / W + dW T,  dC += x^T dU + C (dT + dT^T) with T = C^T C, dT = B^T dW
// dx is the sum over all steps of B dP^T + dU C^T; it is written once, at the end. With a projection, y = (W B) C^T:
//   d(W B) = dy C,  dW = d(W B) B^T,  and W^T d(W B) belongs to dB
#include <vector>

#include "cpu/nmf.h"

namespace segnext {
namespace {

template <class A>
class NmfBackward : public Nmf<A> {
  using Base = Nmf<A>;
  using Base::L;
  using Base::s_;
  using Base::steps_;
  using Base::x_;

 public:
  NmfBackward(const Matrices& grad_out, const Matrices& x, const void* factors, const void* projection, int64_t rank,
              int64_t steps, bool one_step, const Parallel& parallel)
      : Base(x, rank, steps, one_step ? Keep::kLast : Keep::kAll, const_cast<void*>(factors), parallel),
        grad_out_(grad_out),
        projection_(static_cast<const A*>(projection)),
        one_step_(one_step),
        d_c_(Base::c_size_),
        d_p_(Base::c_ratio_slots_ * Base::c_size_),
        d_b_(Base::b_size_),
        d_u_(Base::kept_steps_ * Base::b_size_),
        d_w_(Base::b_size_),
        gram_(x.batch * s_.rank * s_.padded),
        yc_(projection == nullptr ? 0 : x.batch * s_.chunks * s_.D * s_.padded) {}

  void run_forward(const void* bases) { Base::run(bases); }

  void run(const NmfGradients& gradients) {
    Base::project(projection_);
    for (int64_t step = steps_; step >= 0; --step) {
      back_through_coefficients(step);
      if (projection_ != nullptr && step == steps_) sum_projected_grad();
      if (one_step_) break;
      add_to_bases_grad(step);
      if (step > 0) back_through_bases(step);
    }
    if (gradients.x.data != nullptr) write_grad_x(gradients.x);
    if (gradients.bases != nullptr) write_grad_bases(static_cast<A*>(gradients.bases));
    if (gradients.projection != nullptr) write_grad_projection(static_cast<A*>(gradients.projection));
  }

 private:
  // Of the products x^T B and x C in the updates of C and B of a step.
  A* d_p(int64_t step, int64_t image, int64_t row) {
    return d_p_ + (one_step_ ? 0 : step) * Base::c_size_ + (image * s_.N + row) * s_.padded;
  }
  A* d_u(int64_t step, int64_t image) { return d_u_ + step * Base::b_size_ + image * s_.D * s_.padded; }

  // C of step + 1 was made from C and B of step. Leaves dC of step in d_c_, dP in d_p(step), and x dP and C^T dQ in the chunks'
  // sums.
  void back_through_coefficients(int64_t step) {
    Base::sum_bb(step);
    if (!one_step_) Base::begin_pass();
    Base::parallel_(x_.batch * s_.chunks, [&](Share& items) {
      Tile<A> x(s_), grad(s_);
      Buffer<A> den(s_.tile * s_.padded), d_q(s_.tile * s_.padded);
      for (const int64_t item : items) {
        const int64_t image = item / s_.chunks;
        Base::for_tiles_of(item, [&](int64_t first, int64_t columns, bool add) {
          const int64_t size = columns * s_.padded, at = (image * s_.N + first) * s_.padded;
          const A *before = Base::coefficients(step, image, first), *after = Base::coefficients(step + 1, image, first);
          const A* ratio = Base::c_ratio(step, image, first);
          A *d_c = d_c_ + at, *dp = d_p(step, image, first);
          if (!one_step_) Base::take(x, image, first, columns);
          if (step == steps_) {
            grad.load_from(grad_out_, image, first, columns);
            gemm<A>(grad.by_column(), columns, s_.D, Base::left(image), s_.padded, s_.vectors, d_c, s_.padded, false);
            if (projection_ != nullptr) {
              gemm<A>(grad.by_row(), s_.D, columns, after, s_.padded, s_.vectors, yc_ + item * s_.D * s_.padded, s_.padded,
                      add);
            }
          } else {  // what B of step + 1 passes on
            gemm<A>(x.by_column(), columns, s_.D, d_u(step, image), s_.padded, s_.vectors, d_c, s_.padded, true);
            gemm<A>({after, s_.padded, 1}, columns, s_.rank, gram(image), s_.padded, s_.vectors, d_c, s_.padded, true);
          }
          gemm<A>({before, s_.padded, 1}, columns, s_.rank, Base::bb(image), s_.padded, s_.vectors, den, s_.padded, false);
          for (int64_t i = 0; i < size; i += L) {
            const Vector<A> q = load<A>(d_c + i) / (load<A>(den + i) + epsilon<A>());
            store<A>(d_q + i, -q * load<A>(after + i));
            store<A>(d_c + i, load<A>(d_c + i) * load<A>(ratio + i));
            store<A>(dp + i, q * load<A>(before + i));
          }
          if (one_step_) return;
          gemm<A>({d_q, s_.padded, 1}, columns, s_.rank, Base::bb(image), s_.padded, s_.vectors, d_c, s_.padded, true);
          if (step == 0) back_through_softmax(before, d_c, columns, dp);
          Base::add_to_xc(x, dp, columns, item, add);
          if (step == steps_ && projection_ == nullptr) Base::add_to_xc(grad, after, columns, item, true);
          Base::add_to_cc(before, d_q, columns, item, add);
        });
      }
    });
  }

  // The first coefficients are a softmax of x^T B, the same product as P.
  void back_through_softmax(const A* c, const A* d_c, int64_t columns, A* dp) {
    for (int64_t n = 0; n < columns; ++n) {
      const int64_t row = n * s_.padded;
      A dot = 0;
      for (int64_t r = 0; r < s_.rank; ++r) dot += c[row + r] * d_c[row + r];
      for (int64_t r = 0; r < s_.rank; ++r) dp[row + r] += c[row + r] * (d_c[row + r] - dot);
    }
  }

  // d_b_ += x dP + B (dS + dS^T)
  void add_to_bases_grad(int64_t step) {
    Base::sum_chunks();
    symmetrise([&](int64_t image) { return Base::cc(image); });
    Base::parallel_(x_.batch * s_.row_blocks, [&](Share& items) {
      for (const int64_t item : items) {
        const auto [image, first, rows] = Base::row_block(item);
        const A* sums = Base::xc(image, first, rows);
        A* d_b = d_b_ + (image * s_.D + first) * s_.padded;
        for (int64_t i = 0; i < rows * s_.padded; i += L) {
          store<A>(d_b + i, load<A>(sums + i) + (step == steps_ ? Vector<A>{} : load<A>(d_b + i)));
        }
        gemm<A>({Base::bases(step, image) + first * s_.padded, s_.padded, 1}, rows, s_.rank, gram(image), s_.padded, s_.vectors,
                d_b, s_.padded, true);
        if (step == steps_ && projection_ != nullptr) {
          gemm<A>({projection_ + first, 1, s_.D}, rows, s_.D, d_projected(image), s_.padded, s_.vectors, d_b, s_.padded, true);
        }
      }
    });
  }

  // d_projected <- dy C
  void sum_projected_grad() {
    const int64_t size = s_.D * s_.padded;
    Base::parallel_(x_.batch * s_.D, [&](Share& items) {
      for (const int64_t item : items)
        Base::sum_parts(d_projected(item / s_.D) + item % s_.D * s_.padded, s_.chunks, size, s_.padded);
    });
  }

  // B of step was made from B of step - 1 and C of step. Leaves dB of step - 1 in d_b_, dU in d_u(step - 1), dT + dT^T in
  // gram_.
  void back_through_bases(int64_t step) {
    sum_cc(step);
    Base::parallel_(x_.batch * s_.row_blocks, [&](Share& items) {
      Buffer<A> den(kRowBlock * s_.padded);
      for (const int64_t item : items) {
        const auto [image, first, rows] = Base::row_block(item);
        const int64_t at = first * s_.padded, all = image * s_.D * s_.padded + at;
        const A *before = Base::bases(step - 1, image) + at, *after = Base::bases(step, image) + at;
        const A* ratio = Base::b_ratio(step - 1, image) + at;
        A *d_b = d_b_ + all, *d_w = d_w_ + all, *du = d_u(step - 1, image) + at;
        gemm<A>({before, s_.padded, 1}, rows, s_.rank, Base::cc(image), s_.padded, s_.vectors, den, s_.padded, false);
        for (int64_t i = 0; i < rows * s_.padded; i += L) {
          const Vector<A> q = load<A>(d_b + i) / (load<A>(den + i) + epsilon<A>());
          store<A>(d_w + i, -q * load<A>(after + i));
          store<A>(d_b + i, load<A>(d_b + i) * load<A>(ratio + i));
          store<A>(du + i, q * load<A>(before + i));
        }
        gemm<A>({d_w, s_.padded, 1}, rows, s_.rank, Base::cc(image), s_.padded, s_.vectors, d_b, s_.padded, true);
      }
    });
    Base::sum_rows(Base::bases(step - 1, 0), d_w_);
    symmetrise([&](int64_t image) { return Base::bb(image); });
  }

  // cc <- C^T C of a step
  void sum_cc(int64_t step) {
    Base::parallel_(x_.batch * s_.chunks, [&](Share& items) {
      for (const int64_t item : items) {
        Base::for_tiles_of(item, [&](int64_t first, int64_t columns, bool add) {
          const A* c = Base::coefficients(step, item / s_.chunks, first);
          Base::add_to_cc(c, c, columns, item, add);
        });
      }
    });
    Base::sum_chunks();
  }

  // Of the projected bases [D][padded].
  A* d_projected(int64_t image) { return yc_ + image * s_.chunks * s_.D * s_.padded; }
  A* gram(int64_t image) { return gram_ + image * s_.rank * s_.padded; }
  // gram_ <- M + M^T for each image's [rank][padded]
  template <class F>
  void symmetrise(const F& of) {
    for (int64_t image = 0; image < x_.batch; ++image) {
      const A* m = of(image);
      A* sum = gram(image);
      for (int64_t i = 0; i < s_.rank; ++i) {
        for (int64_t j = 0; j < s_.padded; ++j) {
          sum[i * s_.padded + j] = j < s_.rank ? m[i * s_.padded + j] + m[j * s_.padded + i] : 0;
        }
      }
    }
  }

  void write_grad_x(const Matrices& grad_x) {
    constexpr int64_t kDepth = 256, kDeep = 64;  // enough for a product of several pairs, and for one pair alone
    const int64_t count = 2 * Base::kept_steps_ + 1;
    const int64_t most = s_.rank < kDeep ? std::clamp<int64_t>(kDepth / s_.rank, 1, count) : 1;
    Base::parallel_(x_.batch * s_.chunks, [&](Share& items) {
      Tile<A> out(s_);
      Buffer<A> scratch(out.scratch_size(s_, most));
      std::vector<Pair<A>> pairs(count);
      for (const int64_t item : items) {
        const int64_t image = item / s_.chunks;
        Base::for_tiles_of(item, [&](int64_t first, int64_t columns, bool) {
          auto next = pairs.begin();
          *next++ = {Base::bases(steps_, image), d_p(steps_, image, first)};
          for (int64_t step = Base::kept_steps_; step > 0; --step) {
            *next++ = {d_u(step - 1, image), Base::coefficients(step, image, first)};
            *next++ = {Base::bases(step - 1, image), d_p(step - 1, image, first)};
          }
          for (int64_t i = 0; i < count; i += most)
            out.product(s_, pairs.data() + i, std::min(most, count - i), columns, i > 0, scratch);
          out.store_to(grad_x, image, first, columns);
        });
      }
    });
  }

  void write_grad_bases(A* grad_bases) {
    for (int64_t i = 0; i < x_.batch * s_.D; ++i) {
      for (int64_t r = 0; r < s_.rank; ++r) grad_bases[i * s_.rank + r] = one_step_ ? 0 : d_b_[i * s_.padded + r];
    }
  }

  // grad_projection [D][D] <- the sum over all matrices of d(W B) B^T
  void write_grad_projection(A* grad_projection) {
    const int64_t row = round_up(s_.D, L);
    Base::parallel_(s_.row_blocks, [&](Share& items) {
      Buffer<A> transposed(s_.rank * row), sums(kRowBlock * row);
      for (const int64_t block : items) {
        const int64_t first = block * kRowBlock, rows = std::min(kRowBlock, s_.D - first);
        for (int64_t image = 0; image < x_.batch; ++image) {
          transpose_rows<A>(Base::last_bases(image), s_.padded, s_.D, s_.rank, transposed, row);
          gemm<A>({d_projected(image) + first * s_.padded, s_.padded, 1}, rows, s_.rank, transposed, row, row / L, sums, row,
                  image > 0);
        }
        for (int64_t d = 0; d < rows; ++d) std::copy_n(sums + d * row, s_.D, grad_projection + (first + d) * s_.D);
      }
    });
  }

  const Matrices& grad_out_;
  const A* projection_;
  const bool one_step_;
  Buffer<A> d_c_, d_p_, d_b_, d_u_, d_w_, gram_, yc_;  // the last: dy C of every chunk
};

}  // namespace

void nmf_backward(const Matrices& grad_out, const Matrices& x, const void* bases, const void* factors, const void* projection,
                  int64_t rank, int64_t steps, bool one_step, const NmfGradients& gradients, const Parallel& parallel) {
  nmf_factors_size(x, rank, steps, one_step);  // throws where no memory could hold them
  with_accumulator(x.dtype, [&]<class A>() {
    NmfBackward<A> backward(grad_out, x, factors, projection, rank, steps, one_step, parallel);
    if (factors == nullptr) backward.run_forward(bases);
    backward.run(gradients);
  });
}

}  // namespace segnext
