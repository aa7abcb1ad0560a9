// The C interface: picks the functions of an instruction set and hands them chunks of the arrays, thread by thread.
//
// What is called here is right for any number of threads: an element's result depends on that element alone, and a
// square sum on the elements of its block.
#include "threads.h"
#include "tier.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int ABI = 2;  // native.py knows it by the same number
constexpr int ITEM_BYTES[] = {4, 2, 2, 0, 2};

enum TierCode : int32_t { GENERIC, NEON, AVX2, AVX512 };

#if defined(__x86_64__)
bool supports_f16c() {  // which not every compiler's __builtin_cpu_supports knows
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

[[maybe_unused]] bool supports_avx2() { return __builtin_cpu_supports("avx2") && supports_f16c(); }

[[maybe_unused]] bool supports_avx512() {
    return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
#endif

const Tier* tier_of(int32_t code) {
    switch (code) {
#if defined(ZL_WITH_AVX512)
        case AVX512: return supports_avx512() ? &TIER_AVX512 : nullptr;
#endif
#if defined(ZL_WITH_AVX2)
        case AVX2: return supports_avx2() ? &TIER_AVX2 : nullptr;
#endif
#if defined(ZL_WITH_NEON)
        case NEON: return &TIER_NEON;
#endif
        case GENERIC: return &TIER_GENERIC;
        default: return nullptr;
    }
}

template <class T>
T* moved(T* base, Index bytes) {
    return base ? (T*)((char*)base + bytes) : nullptr;
}

Streams at(const Streams& s, Index element, int32_t grad_format, int32_t target) {
    const int master_bytes = target == SPLIT ? 2 : 4;
    return {moved(s.grad, element * ITEM_BYTES[grad_format]), moved(s.master, element * master_bytes),
            moved(s.remainder, element * 2),                  moved(s.first, element * 4),
            moved(s.second, element * 4),                     moved(s.out, element * ITEM_BYTES[target])};
}

Index chunks_of(Index numel) { return (numel + CHUNK - 1) / CHUNK; }

Index size_of(Index chunk, Index numel) {
    const Index left = numel - chunk * CHUNK;
    return left < CHUNK ? left : CHUNK;
}

}  // namespace

EXPORT int32_t zl_abi() { return ABI; }

// Whether this library has the instruction set and this processor can run it.
EXPORT int32_t zl_can_run(int32_t tier) { return tier_of(tier) != nullptr; }

EXPORT void zl_update(int32_t tier, int32_t threads, int32_t kind, const Scalars* scalars, const Streams* streams,
                      int32_t grad_format, int32_t target, int32_t streaming, Index numel) {
    const Update each = tier_of(tier)->update[kind][grad_format][target];
    for_each_chunk(threads, chunks_of(numel), [=](Index chunk) {
        each(*scalars, at(*streams, chunk * CHUNK, grad_format, target), size_of(chunk, numel), streaming);
    });
}

// blocks: room for one number per block.
EXPORT void zl_square_sums(int32_t tier, int32_t threads, const void* values, int32_t format, Index numel,
                           double* blocks) {
    const Squares each = tier_of(tier)->square_sums[format];
    for_each_chunk(threads, chunks_of(numel), [=](Index chunk) {
        const Index begin = chunk * CHUNK;
        each((const char*)values + begin * ITEM_BYTES[format], size_of(chunk, numel), blocks + begin / BLOCK);
    });
}

// blocks: as above, or null.
EXPORT void zl_add(int32_t tier, int32_t threads, float* sum, int32_t fresh, const void* const* terms,
                   int32_t num_terms, int32_t format, Index numel, double* blocks, int32_t streaming) {
    const Add each = tier_of(tier)->add[format];
    for_each_chunk(threads, chunks_of(numel), [=](Index chunk) {
        const Index begin = chunk * CHUNK;
        each(sum + begin, fresh, terms, num_terms, begin, size_of(chunk, numel), moved(blocks, begin / BLOCK * 8),
             streaming);
    });
}

EXPORT void zl_split(int32_t tier, int32_t threads, float* master, uint16_t* weight, int16_t* remainder, Index numel) {
    const Split each = tier_of(tier)->split;
    for_each_chunk(threads, chunks_of(numel), [=](Index chunk) {
        const Index begin = chunk * CHUNK;
        each(master + begin, weight + begin, remainder + begin, size_of(chunk, numel));
    });
}

EXPORT void zl_join(int32_t tier, int32_t threads, float* master, uint16_t* weight, int16_t* remainder, Index numel) {
    const Split each = tier_of(tier)->join;
    for_each_chunk(threads, chunks_of(numel), [=](Index chunk) {
        const Index begin = chunk * CHUNK;
        each(master + begin, weight + begin, remainder + begin, size_of(chunk, numel));
    });
}

// Only for benchmarks: what memory allows. See copy_rows.
EXPORT void zl_copy(int32_t tier, int32_t threads, const Streams* streams, int32_t format, int32_t streaming,
                    Index numel) {
    const Copy each = tier_of(tier)->copy[format];
    for_each_chunk(threads, chunks_of(numel), [=](Index chunk) {
        each(at(*streams, chunk * CHUNK, format, format), size_of(chunk, numel), streaming);
    });
}
