// The arithmetic of the optimizers, on W elements at a time. recipe.py gives the steps and their rounding in words.
//
// Each operation below rounds once, to fp32. The compiler must neither reorder them nor fuse two (-ffp-contract=off).
#pragma once

#include "lanes.h"
#include "tier.h"

namespace {

// What a loop needs of the scalars: decisions taken once.
struct Constants : Scalars {
    Floats first_toward, second_toward;  // see lerp()
    Vector<int32_t, W> first_is_large, second_is_large;
    bool decays;

    explicit Constants(const Scalars& k)
        : Scalars(k),
          first_toward(Floats{} + (k.first_gain < 0.5f ? k.first_gain : k.first_gain - 1.0f)),
          second_toward(Floats{} + (k.second_gain < 0.5f ? k.second_gain : k.second_gain - 1.0f)),
          first_is_large(Vector<int32_t, W>{} - (k.first_gain < 0.5f ? 0 : 1)),
          second_is_large(Vector<int32_t, W>{} - (k.second_gain < 0.5f ? 0 : 1)),
          decays(k.weight_decay != 0.0f) {}
};

// from + (to - from) gain, or from the other end where that is nearer: to + (to - from) (gain - 1).
inline Floats lerp(Floats from, Floats to, Floats toward, Vector<int32_t, W> is_large) {
    return (is_large ? to : from) + (to - from) * toward;
}

inline Floats with_decay(const Constants& k, Floats grad, Floats weight) {
    return k.decays ? grad + weight * k.weight_decay : grad;
}

struct AdamRule {
    static constexpr int states = 2;
    static void apply(const Constants& k, Floats grad, Floats& weight, Floats& average, Floats& square) {
        average = lerp(average, grad, k.first_toward, k.first_is_large);
        square = square * k.second_keep + grad * k.second_gain * grad;
        weight = weight - average * k.rate / (root(square) + k.eps);
    }
};

struct AdamWRule : AdamRule {  // the decay apart from the gradient
    static void apply(const Constants& k, Floats grad, Floats& weight, Floats& average, Floats& square) {
        weight = weight * k.decay;
        AdamRule::apply(k, grad, weight, average, square);
    }
};

struct AdamL2Rule : AdamRule {  // the decay in the gradient
    static void apply(const Constants& k, Floats grad, Floats& weight, Floats& average, Floats& square) {
        AdamRule::apply(k, with_decay(k, grad, weight), weight, average, square);
    }
};

struct LionRule {
    static constexpr int states = 1;
    static void apply(const Constants& k, Floats grad, Floats& weight, Floats& average, Floats&) {
        const Floats direction = sign(average * k.first_keep + grad * k.first_gain);
        weight = weight * k.decay - direction * k.rate;
        average = lerp(average, grad, k.second_toward, k.second_is_large);
    }
};

struct AdagradRule {
    static constexpr int states = 1;
    static void apply(const Constants& k, Floats grad, Floats& weight, Floats& square, Floats&) {
        grad = with_decay(k, grad, weight);
        square = square + grad * grad;
        weight = weight - grad * k.rate / (root(square) + k.eps);
    }
};

struct SgdRule {
    static constexpr int states = 0;
    static void apply(const Constants& k, Floats grad, Floats& weight, Floats&, Floats&) {
        weight = weight - with_decay(k, grad, weight) * k.rate;
    }
};

struct MomentumRule {
    static constexpr int states = 1;
    static void apply(const Constants& k, Floats grad, Floats& weight, Floats& momentum, Floats&) {
        grad = with_decay(k, grad, weight);
        momentum = k.is_first ? grad : momentum * k.first_keep + grad * k.first_gain;
        weight = weight - (k.is_nesterov ? grad + momentum * k.first_keep : momentum) * k.rate;
    }
};

}  // namespace
