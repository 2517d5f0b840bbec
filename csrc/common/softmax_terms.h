// What the forward of attention leaves its backward of a row's softmax. The weight of a key is
//
//   2^(score - largest) * factor,   score in base 2
//
// with the scores' own largest one, or on CUDA up to 8 less, and the reciprocal of the sum of 2^(score - largest). lse
// cannot stand in for the two: of scores far from 0 it has no digits left for the sum's logarithm, and rounding it, above
// all from one base to another, makes exp(score - lse) anything from 0 to inf. So scores of a backward must be the
// forward's to the last bit: the same products summed in the same order, and rounded before largest is subtracted.
#pragma once

#include <cmath>

#include "array.h"

namespace topgather {

template <typename T>
struct SoftmaxTerms {
  T largest;  // finite where all scores are -inf, so that their difference is no NaN
  T factor;   // NaN where the row's weights are
};

// As they lie in memory: [..., 2].
template <typename T>
TOPGATHER_HOST_DEVICE void write_softmax_terms(T largest, T sum, T* terms) {
  terms[0] = largest == -INFINITY ? T(0) : largest;
  terms[1] = 1 / sum;
}

// `terms` may be null: then lse, a natural logarithm, is all there is. A score of +inf makes a whole row NaN.
template <typename T>
TOPGATHER_HOST_DEVICE SoftmaxTerms<T> read_softmax_terms(const T* terms, T lse) {
  if (terms != nullptr) return {terms[0], terms[1]};
  return {lse * static_cast<T>(1.4426950408889634074), lse == INFINITY ? static_cast<T>(NAN) : T(1)};
}

}  // namespace topgather
