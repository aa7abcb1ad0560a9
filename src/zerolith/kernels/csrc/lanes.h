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

// Past the caches where the instruction set can; `to` is aligned to the size of V.
template <class V>
inline void stream(void* to, V value) {
#if defined(ZL_AVX512) || defined(ZL_AVX2)
    if constexpr (sizeof(V) == 16) {
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

// What the compilers make of __builtin_convertvector between these is three times as long in AVX2.
template <int N>
inline Vector<uint32_t, N> widen(Vector<uint16_t, N> x) {
#if defined(ZL_AVX2)
    if constexpr (N == 8) return (Vector<uint32_t, N>)_mm256_cvtepu16_epi32((__m128i)x);
#endif
    return __builtin_convertvector(x, Vector<uint32_t, N>);
}

// Each number fits in 16 bits.
template <int N>
inline Vector<uint16_t, N> narrow(Vector<uint32_t, N> x) {
#if defined(ZL_AVX2)
    if constexpr (N == 8) {
        const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x, (__m256i)x), 0b1000);
        return (Vector<uint16_t, N>)_mm256_castsi256_si128(pairs);
    }
#endif
    return __builtin_convertvector(x, Vector<uint16_t, N>);
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

template <int N>
inline Vector<float, N> widen_fp16(Vector<uint32_t, N> half) {
    using U = Vector<uint32_t, N>;
    using F = Vector<float, N>;
    constexpr uint32_t exponent = 0x7c00u << 13, rebias = (127u - 15u) << 23;
    const U magnitude = (half & 0x7fffu) << 13, range = magnitude & exponent;
    const U normal = magnitude + rebias;
    const U special = normal + ((128u - 16u) << 23);  // inf and NaN
    const F subnormal = (F)(normal + (1u << 23)) - (F)(U{} + (113u << 23));
    const U finite = range == 0u ? (U)subnormal : normal;
    return (F)((range == exponent ? special : finite) | (half & 0x8000u) << 16);
}

template <int N>
inline Vector<uint32_t, N> narrow_fp16(Vector<float, N> x) {
    using U = Vector<uint32_t, N>;
    using I = Vector<int32_t, N>;
    using F = Vector<float, N>;
    constexpr uint32_t infinity = 0x7f800000u, overflow = 0x47800000u, smallest_normal = 0x38800000u;
    const U bits = (U)x, magnitude = bits & 0x7fffffffu;
    const U normal = (magnitude + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23) + 0xfffu) >> 13;
    const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000u;
    const U special = (I)magnitude > (I)(U{} + infinity) ? U{} + 0x7e00u : U{} + 0x7c00u;
    const U finite = (I)magnitude < (I)(U{} + smallest_normal) ? subnormal : normal;
    return ((I)magnitude >= (I)(U{} + overflow) ? special : finite) | (bits & 0x80000000u) >> 16;
}

// --- formats --------------------------------------------------------------------------------------------------------

struct Fp32 {
    static constexpr int bytes = 4;
    template <int N = W>
    static Vector<float, N> widen(const void* from) {
        return load<Vector<float, N>>(from);
    }
    static Floats narrow(Floats x) { return x; }
};

struct Bf16 {
    static constexpr int bytes = 2;
    template <int N = W>
    static Vector<float, N> widen(const void* from) {
        return (Vector<float, N>)(::widen<N>(load<Vector<uint16_t, N>>(from)) << 16);
    }
    static Vector<uint16_t, W> narrow(Floats x) {  // to nearest even; NaN becomes 0x7fc0
        using U = Vector<uint32_t, W>;
        const U bits = (U)x, rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
        return ::narrow<W>(x != x ? U{} + 0x7fc0u : rounded);
    }
};

struct Fp16 {
    static constexpr int bytes = 2;
    template <int N = W>
    static Vector<float, N> widen(const void* from) {
#if defined(ZL_AVX512)
        if constexpr (N == 16) return (Vector<float, N>)_mm512_cvtph_ps(load<__m256i>(from));
#endif
#if defined(ZL_AVX512) || defined(ZL_AVX2)
        if constexpr (N == 8) return (Vector<float, N>)_mm256_cvtph_ps(load<__m128i>(from));
        if constexpr (N == 4) return (Vector<float, N>)_mm_cvtph_ps(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
#elif defined(ZL_NEON)
        if constexpr (N == 4) return (Vector<float, N>)vcvt_f32_f16((float16x4_t)load<Vector<uint16_t, 4>>(from));
#endif
        return widen_fp16<N>(::widen<N>(load<Vector<uint16_t, N>>(from)));
    }
    static Vector<uint16_t, W> narrow(Floats x) {  // to nearest even
        using Halves = Vector<uint16_t, W>;
#if defined(ZL_AVX512)
        return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(ZL_AVX2)
        return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(ZL_NEON)
        return (Halves)vcvt_f16_f32((float32x4_t)x);
#else
        return ::narrow<W>(narrow_fp16<W>(x));
#endif
    }
};

// --- an fp32 number as bf16 and 16 more bits -------------------------------------------------------------------------

// The remainder is the lower half as it is; the weight is the upper half, one more if the lower half is half a unit or
// more: the nearest bf16, away from zero if two are as near. NaN becomes (0x7fc0, 0).
struct Halves {
    Vector<uint16_t, W> weight;
    Vector<int16_t, W> remainder;
};

inline Halves split(Floats x) {
    using U = Vector<uint32_t, W>;
    const U bits = x != x ? U{} + 0x7fc00000u : (U)x;
    return {narrow<W>((bits + 0x8000u) >> 16), (Vector<int16_t, W>)narrow<W>(bits & 0xffffu)};
}

inline Floats join(Halves halves) {
    using U = Vector<uint32_t, W>;
    const U lower = widen<W>((Vector<uint16_t, W>)halves.remainder);
    return (Floats)((widen<W>(halves.weight) << 16) + lower - ((lower & 0x8000u) << 1));
}

}  // namespace
