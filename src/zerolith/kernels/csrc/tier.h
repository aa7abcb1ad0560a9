// What the C interface (library.cpp) and the instruction sets (tier.cpp, compiled once for each) have in common.
#pragma once

#include <stdint.h>

using Index = int64_t;

constexpr Index BLOCK = 256;          // elements of one term of a square sum
constexpr Index CHUNK = 256 * BLOCK;  // elements that a thread takes at a time

enum Kind : int32_t { ADAMW, ADAM_L2, LION, ADAGRAD, SGD, MOMENTUM, KINDS };
enum Format : int32_t { FP32, BF16, FP16, FORMATS };
enum Target : int32_t { TO_FP32, TO_BF16, TO_FP16, TO_NOTHING, SPLIT, TARGETS };  // where new weights go

// Numbers of one update, each rounded to fp32 once; recipe.py says how they are made and what they do.
struct Scalars {
    float grad_factor;
    float weight_decay;  // added to the gradient, times the weight
    float decay;         // multiplies the weight
    float first_keep;
    float first_gain;
    float second_keep;
    float second_gain;
    float eps;
    float rate;
    int32_t is_first;
    int32_t is_nesterov;
};

// Arrays of one update, all of the same number of elements. They must not overlap. No alignment is asked for.
struct Streams {
    const void* grad;
    void* master;        // fp32; of a split master the bf16 weights
    int16_t* remainder;  // of a split master
    float* first;        // states that the kind has
    float* second;
    void* out;  // new weights, where the target wants them
};

using Update = void (*)(const Scalars&, const Streams&, Index numel, bool streaming);
using Squares = void (*)(const void* values, Index numel, double* blocks);
using Add = void (*)(float* sum, bool fresh, const void* const* terms, int32_t num_terms, Index begin, Index numel,
                     double* blocks, bool streaming);
using Split = void (*)(float* master, uint16_t* weight, int16_t* remainder, Index numel);
using Copy = void (*)(const Streams&, Index numel, bool streaming);

// The functions of one instruction set. None of them starts threads.
struct Tier {
    Update update[KINDS][FORMATS][TARGETS];
    Squares square_sums[FORMATS];
    Add add[FORMATS];
    Split split;
    Split join;
    Copy copy[FORMATS];
};

extern const Tier TIER_GENERIC, TIER_NEON, TIER_AVX2, TIER_AVX512;
