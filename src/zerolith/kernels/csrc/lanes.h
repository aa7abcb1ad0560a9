// W numbers at a time in one instruction set, and the formats in which they lie in memory.
//
// Everything has internal linkage: were these functions shared between translation units of different instruction
// sets, the linker could put AVX-512 code where the generic code is called.
#pragma once

#include <stdint.h>

#if defined(ZL_AVX512) || defined(ZL_AVX2)
#include <immintrin.h>
#elif defined(ZL_NEON)
#include <arm_neon.h>
#endif

namespace {

template <class T, int N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

#if defined(ZL_AVX512)
constexpr int W = 16;
#elif defined(ZL_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using Floats = Vector<float, W>;
using Words = Vector<uint32_t, W>;
using Shorts = Vector<uint16_t, 2 * W>;  // of two vectors of numbers

template <class V>
inline V load(const void* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <class V>
inline void store(void* to, V value) {
    __builtin_memcpy(to, &value, sizeof value);
}

// A store; if streaming, past the caches where the instruction set can, and `to` is aligned to the size of V.
template <bool streaming, class V>
inline void put(void* to, V value) {
#if defined(ZL_AVX512) || defined(ZL_AVX2)
    if constexpr (!streaming) {
        store(to, value);
    } else if constexpr (sizeof(V) == 16) {
        _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)value);
    } else if constexpr (sizeof(V) == 32) {
        _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
    } else {
#if defined(ZL_AVX512)
        _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
#endif
    }
#else
    store(to, value);
#endif
}

inline void end_streams() {
#if defined(ZL_AVX512) || defined(ZL_AVX2)
    _mm_sfence();
#endif
}

// 16-bit integers as 32-bit ones, with zeros or the sign above. Compilers' own code for AVX2 is three times as long.
inline Words widen(Vector<uint16_t, W> x) {
#if defined(ZL_AVX2)
    return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}

inline Words widen(Vector<int16_t, W> x) {
#if defined(ZL_AVX2)
    return (Words)_mm256_cvtepi16_epi32((__m128i)x);
#else
    return (Words)__builtin_convertvector(x, Vector<int32_t, W>);
#endif
}

// The other way; each number fits in 16 bits without a sign.
inline Shorts narrow(Words a, Words b) {
#if defined(ZL_AVX512)
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return (Shorts)_mm512_permutexvar_epi64(order, _mm512_packus_epi32((__m512i)a, (__m512i)b));
#elif defined(ZL_AVX2)
    return (Shorts)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)a, (__m256i)b), 0b11011000);
#else
    const Vector<uint16_t, W> halves[] = {__builtin_convertvector(a, Vector<uint16_t, W>),
                                          __builtin_convertvector(b, Vector<uint16_t, W>)};
    return load<Shorts>(halves);
#endif
}

inline Floats root(Floats x) {
#if defined(ZL_AVX512)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(ZL_AVX2)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(ZL_NEON)
    return (Floats)vsqrtq_f32((float32x4_t)x);
#else
    for (int lane = 0; lane < W; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
}

// +1, 0 or -1, and 0 for NaN.
inline Floats sign(Floats x) {
    const Floats zero = {}, one = zero + 1.0f;
    return (x > zero ? one : zero) - (x < zero ? one : zero);
}

// --- fp16 where no instruction converts it; both are exact but for the rounding to nearest even ---------------------

inline Floats widen_fp16(Words half) {
    constexpr uint32_t exponent = 0x7c00u << 13, rebias = (127u - 15u) << 23;
    const Words magnitude = (half & 0x7fffu) << 13, range = magnitude & exponent;
    const Words normal = magnitude + rebias;
    const Words special = normal + ((128u - 16u) << 23);  // inf and NaN
    const Floats subnormal = (Floats)(normal + (1u << 23)) - (Floats)(Words{} + (113u << 23));
    const Words finite = range == 0u ? (Words)subnormal : normal;
    return (Floats)((range == exponent ? special : finite) | (half & 0x8000u) << 16);
}

inline Words narrow_fp16(Floats x) {
    using Signed = Vector<int32_t, W>;
    constexpr int32_t infinity = 0x7f800000, overflow = 0x47800000, smallest_normal = 0x38800000;
    const Words bits = (Words)x, magnitude = bits & 0x7fffffffu;
    const Signed size = (Signed)magnitude;
    const Words normal = (magnitude + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23) + 0xfffu) >> 13;
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
    const Words special = size > infinity ? Words{} + 0x7e00u : Words{} + 0x7c00u;
    const Words finite = size < smallest_normal ? subnormal : normal;
    return (size >= overflow ? special : finite) | (bits & 0x80000000u) >> 16;
}

// --- formats --------------------------------------------------------------------------------------------------------

struct Fp32 {
    static constexpr int bytes = 4;
    static Floats widen(const void* from) { return load<Floats>(from); }
    template <bool streaming>
    static void put(char* to, Floats a, Floats b) {
        ::put<streaming>(to, a);
        ::put<streaming>(to + sizeof a, b);
    }
};

struct Bf16 {
    static constexpr int bytes = 2;
    static Floats widen(const void* from) { return (Floats)(::widen(load<Vector<uint16_t, W>>(from)) << 16); }
    static Words round(Floats x) {  // to nearest even, in the lower half of each word; NaN becomes 0x7fc0
        const Words bits = (Words)x, rounded = bits + ((bits >> 16) & 1u) + 0x7fffu;
        return (x != x ? Words{} + 0x7fc00000u : rounded) >> 16;
    }
    template <bool streaming>
    static void put(char* to, Floats a, Floats b) {
        ::put<streaming>(to, narrow(round(a), round(b)));
    }
};

struct Fp16 {
    static constexpr int bytes = 2;
    static Floats widen(const void* from) {
#if defined(ZL_AVX512)
        return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(ZL_AVX2)
        return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#elif defined(ZL_NEON)
        return (Floats)vcvt_f32_f16((float16x4_t)load<Vector<uint16_t, W>>(from));
#else
        return widen_fp16(::widen(load<Vector<uint16_t, W>>(from)));
#endif
    }
    template <bool streaming>
    static void put(char* to, Floats a, Floats b) {  // to nearest even
#if defined(ZL_AVX512)
        ::put<streaming>(to, _mm512_cvtps_ph((__m512)a, TO_NEAREST));
        ::put<streaming>(to + W * 2, _mm512_cvtps_ph((__m512)b, TO_NEAREST));
#elif defined(ZL_AVX2)
        ::put<streaming>(to, _mm256_cvtps_ph((__m256)a, TO_NEAREST));
        ::put<streaming>(to + W * 2, _mm256_cvtps_ph((__m256)b, TO_NEAREST));
#elif defined(ZL_NEON)
        ::put<streaming>(to, vcvt_high_f16_f32(vcvt_f16_f32((float32x4_t)a), (float32x4_t)b));
#else
        ::put<streaming>(to, narrow(narrow_fp16(a), narrow_fp16(b)));
#endif
    }
#if defined(ZL_AVX512) || defined(ZL_AVX2)
    static constexpr int TO_NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif
};

// --- fp64 -----------------------------------------------------------------------------------------------------------

using Doubles = Vector<double, W / 2>;

// W numbers as fp64, in two halves.
struct WidePair {
    Doubles low, high;
};

template <class Format>
inline WidePair widen_to_fp64(const char* from) {
    const Floats x = Format::widen(from);
#if defined(ZL_AVX512)
    const __m512d pairs = (__m512d)x;
    return {(Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)),
            (Doubles)_mm512_cvtps_pd((__m256)_mm512_extractf64x4_pd(pairs, 1))};
#elif defined(ZL_AVX2)
    return {(Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)),
            (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1))};
#elif defined(ZL_NEON)
    return {(Doubles)vcvt_f64_f32(vget_low_f32((float32x4_t)x)), (Doubles)vcvt_high_f64_f32((float32x4_t)x)};
#else
    Vector<float, W / 2> halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
    return {__builtin_convertvector(halves[0], Doubles), __builtin_convertvector(halves[1], Doubles)};
#endif
}

// --- an fp32 number as bf16 and 16 more bits ------------------------------------------------------------------------

// The remainder is the lower half as it is; the weight is the upper half, one more if the lower half is half a unit or
// more: the nearest bf16, away from zero if two are as near. NaN becomes (0x7fc0, 0).
struct SplitPair {
    Shorts weight, remainder;
};

inline SplitPair split(Floats a, Floats b) {
    const Words nan = Words{} + 0x7fc00000u, x = a != a ? nan : (Words)a, y = b != b ? nan : (Words)b;
    return {narrow((x + 0x8000u) >> 16, (y + 0x8000u) >> 16), narrow(x & 0xffffu, y & 0xffffu)};
}

inline Floats join(Vector<uint16_t, W> weight, Vector<int16_t, W> remainder) {
    return (Floats)((widen(weight) << 16) + widen(remainder));
}

}  // namespace
